"""The repeated blocks of a model."""

from torch import nn


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The modules of all lists in which a class occurs, outermost lists only."""
    found: list[nn.Module] = []

    def walk(one: nn.Module) -> None:
        for child in one.children():
            if isinstance(child, nn.ModuleList) and len(child) and any(True for _ in child[0].children()):
                found.extend(child)
            else:
                walk(child)

    walk(module)
    return found
