"""Walking jaxprs: every equation with the modules that it is part of."""

from collections.abc import Iterator

import jax


def equations(jaxpr, scope: str = "") -> Iterator[tuple]:
    """Yield (equation, names of the modules and functions around it), those of inner jaxprs included."""
    for equation in jaxpr.eqns:
        inside = f"{scope}/{equation.source_info.name_stack}"
        yield equation, inside
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner, inside)


def traced(function, *arguments) -> list[tuple]:
    return list(equations(jax.make_jaxpr(function)(*arguments).jaxpr))
