"""Extension of griffe: a comment at the end of a field's line is its documentation."""

import griffe


class TrailingComments(griffe.Extension):
    """Makes `c: Float[Array, "B H K"]  # cell` show "cell", as `--help` of the commands does."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_) -> None:
        if attr.docstring is not None or attr.lineno is None or attr.endlineno is None:
            return
        line = attr.lines_collection[attr.filepath][attr.endlineno - 1]
        _, mark, comment = line.partition("  # ")
        if mark and not comment.startswith(("noqa", "pyright", "type:")):
            attr.docstring = griffe.Docstring(comment, parent=attr, lineno=attr.endlineno)
