"""Names of tensors from models that were compiled, wrapped or saved without their head.

`torch.compile` and the wrappers of PyTorch for several devices put their attribute into the names,
and a part of a model is saved without the name of that part.
"""

import re
from collections.abc import Collection, Sequence

from xlstm_jax.convert.names import Rule
from xlstm_jax.convert.tensors import Source

# Anywhere in a name, as single blocks may be wrapped.
_WRAPPERS = re.compile(
    r"(?<![^.])_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module|forward_module)\."
)


def unwrapped(names: Collection[str], rules: Sequence[Rule], base: str) -> dict[str, str]:
    """Maps the names of the rules to `names`, which may have prefixes or lack `base`.

    The prefix before the blocks is dropped from all names that have it, such as `module.`. A name
    that no rule has is unchanged. If two names would become the same, all are unchanged.

    Args:
        base: the name of the part that has the blocks, such as "backbone."; may be missing.
    """
    plain = {name: _WRAPPERS.sub("", name) for name in names}
    block = re.compile(rf"(?<![^.])({re.escape(base)})?(blocks|layers)\.[0-9]+\.")
    prefixes = {name[: match.start()] for name in plain.values() if (match := block.search(name))}
    # Several prefixes are several models, such as a teacher and a student.
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    top = {rule.torch_name for rule in rules}

    def canonical(name: str) -> str:
        name = name.removeprefix(prefix)
        is_bare = block.match(name) or base + name in top
        return base + name if is_bare and not name.startswith(base) else name

    result = {canonical(short): name for name, short in plain.items()}
    return result if len(result) == len(plain) else {name: name for name in names}


def unwrap(source: Source, rules: Sequence[Rule], base: str) -> Source:
    """Presents tensors under the names of the rules; as `unwrapped`."""
    names = unwrapped(source.shapes, rules, base)
    shapes = {name: source.shapes[original] for name, original in names.items()}
    return Source(shapes, lambda name: source.read(names[name]))
