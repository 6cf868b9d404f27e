def kind_of(path):
    return None


def open_tokens(*a, **k):
    raise NotImplementedError
