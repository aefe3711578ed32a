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
    split = dict[str, tuple[list[str], str, str]]()  # what comes before the block's number, the number, the kind behind
    for name in names:
        parts = name.split(".")
        at = next((j for j, part in enumerate(parts) if part.isdigit()), None)
        before, block, kind = (parts[:-2], "", parts[-2:]) if at is None else (parts[:at], parts[at], parts[at + 1 :])
        split[name] = before, block, ".".join(kind)
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
