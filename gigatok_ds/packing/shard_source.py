"""Images that lie in shards already, ours or any WebDataset's (img2dataset's, timm's): keys, labels and captions stay.

Labels can also come from a field of each sample's KEY.json, or from a file beside the tars.
"""

from __future__ import annotations

from pathlib import Path

from gigatok_ds.data.folder import class_order
from gigatok_ds.errors import InputError
from gigatok_ds.packing.label_files import read_labels
from gigatok_ds.packing.listing import ImageSource, SourceImage
from gigatok_ds.shards.index import ShardIndex
from gigatok_ds.shards.tar_scan import CAPTION, members_by_key
from gigatok_ds.untrusted import parse_json


def shard_source(path: Path, labels: str | Path | None, field: str | None) -> ImageSource:
    """The images of a directory of tars. labels, field: see `open_source`. Raises InputError for a sample that has no
    label there, and what `ShardIndex.open` raises.
    """
    index = ShardIndex.open(path)
    labelled = index.is_labelled()
    if labels is not None and labelled and field is None:
        raise InputError(f"--labels goes with images without classes; {path} is a directory of tars that say their "
                         "classes, leave it out")
    captions = {shard.name: members_by_key(path / shard.name, CAPTION) for shard in index.shards}
    images = []
    for i in range(len(index)):
        name, offset, size = index.place(i)
        key = index.key(i)
        images.append(SourceImage(key, index.label(i), str(path / name), offset, size, key, captions[name].get(key)))
    source = ImageSource(images=images, classes=index.classes)
    if labels is not None:
        values, notes = read_labels(labels, [image.key for image in images], field)
        return _labelled(source, values, str(labels), notes)
    return source if field is None else _labelled(source, _of_json(path, images, field), f"--label-field {field}", [])


def _labelled(source: ImageSource, values: list[str], origin: str, notes: list[str]) -> ImageSource:
    classes, number = class_order(values, origin)
    images = [image._replace(label=number[value]) for image, value in zip(source.images, values, strict=True)]
    return ImageSource(images=images, classes=classes, notes=notes)


def _of_json(path: Path, images: list[SourceImage], field: str) -> list[str]:
    """The value of a field of each sample's KEY.json."""
    values, places = [], {}
    for image in images:
        if image.path not in places:
            places = {image.path: members_by_key(Path(image.path), "json")}  # images come tar by tar
        place = places[image.path].get(image.key)
        if place is None:
            raise InputError(f"--label-field {field}: sample {image.key!r} of {image.path} has no KEY.json; labels of "
                             "such data can come from --labels")
        with open(image.path, "rb") as file:
            file.seek(place[0])
            said = parse_json(file.read(place[1]), f"{image.key}.json of {image.path}")
        if not isinstance(value := said.get(field), (str, int)) or isinstance(value, bool) or value == "":
            raise InputError(f"--label-field {field}: sample {image.key!r} of {image.path} has {value!r} there; it "
                             f"must be a text or a whole number (its fields are {', '.join(map(str, said))})")
        values.append(str(value))
    return values
