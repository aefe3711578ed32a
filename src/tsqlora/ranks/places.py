"""Where a layer stands in its model: block number and kind, from its name."""

from collections.abc import Iterable


def layer_places(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Each layer's block number ("" outside of blocks) and kind; no two layers share a place.

    Where an encoder's and a decoder's layers would, kinds begin with the part of the name that tells them apart.

    >>> layer_places(["bert.encoder.layer.3.attention.self.query"])
    {'bert.encoder.layer.3.attention.self.query': ('3', 'attention.self.query')}
    >>> list(layer_places(["encoder.block.0.o", "decoder.block.0.o"]).values())
    [('0', 'encoder o'), ('0', 'decoder o')]
    """
    split = {name: _split(name.split(".")) for name in names}
    if len({(block, kind) for _, block, kind in split.values()}) == len(split):
        return {name: (block, kind) for name, (_, block, kind) in split.items()}
    leads = [lead for lead, _, _ in split.values()]
    shared = next((j for j, parts in enumerate(zip(*leads, strict=False)) if len({*parts}) > 1), min(map(len, leads)))
    places = {
        name: (block, " ".join([*lead[shared : shared + 1], kind])) for name, (lead, block, kind) in split.items()
    }
    if len({*places.values()}) == len(places):
        return places
    return {name: (block, name) for name, (_, block, _) in split.items()}


def _split(parts: list[str]) -> tuple[list[str], str, str]:
    """What comes before the block's number, the number, and the kind behind it."""
    at = next((j for j, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return parts[:-2], "", ".".join(parts[-2:])
    return parts[:at], parts[at], ".".join(parts[at + 1 :])
