def make_layout(*a):
    raise NotImplementedError
