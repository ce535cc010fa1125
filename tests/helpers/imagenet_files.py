"""Files as ImageNet is distributed: tars in tars, the development kit."""

import io
import tarfile

import numpy as np
from scipy.io import savemat


def tar_bytes(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def devkit(tmp_path, truth=(30, 10, 30), synsets=((10, "n00000009", 0), (30, "n00000004", 0), (31, "n00000005", 2))):
    synsets = np.array(list(synsets), dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("num_children", "i4")])
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets})
    path = tmp_path / "devkit.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, data in (("meta.mat", buffer.getvalue()),
                           ("ILSVRC2012_validation_ground_truth.txt", "\n".join(map(str, truth)).encode())):
            member = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path
