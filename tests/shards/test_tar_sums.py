"""Of random tars: samples indexed and members left out, by reason, are all members there are, whoever reads them."""

import io
import json
import tarfile
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_shards import encoded

from gigatok_ds.errors import InputError
from gigatok_ds.packing.checking import check_shards
from gigatok_ds.packing.image_sources import open_source
from gigatok_ds.packing.pack_shards import Packing, pack
from gigatok_ds.shards.index import ShardIndex, scan_shards
from gigatok_ds.shards.shard_files import LocalFiles
from gigatok_ds.shards.tar_scan import IMAGE_EXTENSIONS, SAMPLES

STEMS = ("a", "b", "c", "sub/a", "v1.0/a", "./d", "\N{GRINNING FACE}", "\N{CAT FACE}", "!", "x y", "long" * 40,
         ".hidden", "a.b", "é")
EXTENSIONS = ("jpg", "JPEG", "png", "cls", "json", "txt", "", "seg.png")
KINDS = (tarfile.REGTYPE, tarfile.REGTYPE, tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE,
         tarfile.FIFOTYPE)
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)

loose = st.tuples(st.sampled_from(STEMS), st.sampled_from(EXTENSIONS), st.sampled_from(KINDS), st.booleans())
sample = st.tuples(st.sampled_from(STEMS), st.just("sample"), st.just(tarfile.REGTYPE), st.just(False))
group = st.tuples(st.sampled_from(FORMATS), st.lists(st.one_of(sample, sample, loose), max_size=6))
tails = st.sampled_from([0, 0, 0, 0, 512, 4096, 40_960])
thorough = settings(max_examples=80, deadline=None, derandomize=True, database=None,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


def members_of(entries):
    """(name, type, data) of each member: a sample is two."""
    for number, (stem, extension, kind, empty) in enumerate(entries):
        if extension == "sample":
            yield f"{stem}.jpg", kind, encoded(number)
            yield f"{stem}.cls", kind, b"%d" % (number % 3)
        else:
            name = f"{stem}.{extension}" if extension else stem
            data = b"" if empty or kind != tarfile.REGTYPE else b"1" if extension == "cls" else encoded(number)
            yield name, kind, data


def write(path, groups, tail):
    """A file of tars behind each other, with so many zeros at its end; returns how many members it holds."""
    count, parts, earlier = 0, [], None
    for kind_of_tar, entries in groups:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=kind_of_tar) as tar:
            for name, kind, data in members_of(entries):
                member = tarfile.TarInfo(name)
                member.type, member.size = kind, len(data)
                member.linkname = earlier or "nowhere" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
                try:
                    tar.addfile(member, io.BytesIO(data))
                except ValueError:  # ustar has no room for such a name
                    continue
                count += 1
                earlier = name if kind == tarfile.REGTYPE else earlier
        parts.append(buffer.getvalue())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(parts) + bytes(tail))
    return count


@thorough
@given(groups=st.lists(group, min_size=1, max_size=3), tail=tails)
def test_a_foreign_tar_adds_up_on_first_reading_when_packed_and_when_checked(groups, tail, tmp_path_factory):
    root = tmp_path_factory.mktemp("tar")
    count = write(root / "in/x.tar", groups, tail)
    tally = Counter()
    try:
        scan_shards(LocalFiles(root / "in"), ["x.tar"], IMAGE_EXTENSIONS, 1.0, tally)
    except InputError:  # refused, by name, as a whole
        for reader in (lambda: ShardIndex.open(root / "in", max_bad_fraction=1.0), lambda: check_shards(root / "in"),
                       lambda: open_source(root / "in")):
            with pytest.raises(InputError, match=r"x.tar|no samples"):
                reader()
        return
    assert tail <= 4096
    index = ShardIndex.open(root / "in", max_bad_fraction=1.0)
    assert tally.total() == count and tally[SAMPLES] == sum(1 for i in range(len(index)) if index.read(i))
    report = check_shards(root / "in")
    assert report.members == tally and report.samples == len(index)
    assert any(f"{count} members of tars" in line for line in report.lines())
    try:
        source = open_source(root / "in")
    except InputError:  # of samples that lack something, which packing does not tolerate
        assert report.problems
        return
    written = pack(source, root / "out", Packing(samples_per_shard=2), workers=0)
    assert written.count == len(source.images) == len(index) == tally[SAMPLES]
    assert len(ShardIndex.open(root / "out")) == written.count


@thorough
@given(groups=st.lists(group, min_size=1, max_size=3), tail=tails)
def test_a_tar_of_images_adds_up_when_packed(groups, tail, tmp_path_factory):
    root = tmp_path_factory.mktemp("tar")
    count = write(root / "x.tar", groups, tail)
    with tarfile.open(root / "x.tar", ignore_zeros=True) as tar:
        names = sorted({member.name for member in tar})
    (root / "labels.txt").write_text("".join(f"{name} {number % 2}\n"
                                             for number, name in enumerate(names) if " " not in name))
    try:
        source = open_source(root / "x.tar", root / "labels.txt")
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert len(source.images) + source.left_out.total() == count
    try:
        written = pack(source, root / "out", Packing(samples_per_shard=3, skip_bad=True), workers=0)
    except InputError as error:
        assert "no image can be decoded" in str(error)
        return
    skipped = root / "out" / "skipped.json"
    left_out = len(json.loads(skipped.read_text())) if skipped.is_file() else 0
    assert written.count + left_out == len(source.images)
    assert written.count == len(ShardIndex.open(root / "out")) == check_shards(root / "out").samples
