#!/usr/bin/env bash
# Wheels of what sections of gpu_acceptance.py need beyond torch, for a machine without network; about 10 MB.
#
#   benchmarks/bundle_wheels.sh DIR [--python 3.12] [PACKAGE ...]
#
# --python is the version of that machine's Python (default: 3.12), which runs Linux on x86-64. More packages may be named,
# such as timm: they come without what they need in turn. Run it with a Python that has torch (PYTHON=..., default: python3),
# since DeepSpeed asks for torch while its wheel is built, without compiled operators. DIR is replaced if it holds wheels only.
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
out=$1 version=3.12
shift
if [[ ${1:-} == --python ]]; then
    version=${2:?--python needs a version such as 3.12}
    shift 2
fi
if [[ -d $out && -n $(find "$out" -mindepth 1 ! -name '*.whl' -print -quit) ]]; then
    echo "bundle_wheels.sh: error: $out holds other files than wheels; name another directory" >&2
    exit 2
fi
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

platforms=()
for number in 1 2010 2014 _2_{12,17,24,27,28,31,34,35,39}; do
    platforms+=(--platform "manylinux${number}_x86_64")
done
fetch() { "$python" -m pip download --quiet --only-binary=:all: --python-version "$version" --implementation cp "${platforms[@]}" --dest "$work/wheels" "$@"; }

fetch pydantic  # with its core, of exactly one version
fetch --no-deps megatron-core==0.16.1 hjson einops msgpack psutil py-cpuinfo packaging webdataset braceexpand simplejpeg lpips \
    torch-fidelity "$@"
DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --no-build-isolation --no-binary deepspeed --wheel-dir "$work/wheels" \
    deepspeed==0.19.8

size=$(du -sm "$work/wheels" | cut -f1)
if ((size > 60)); then
    echo "bundle_wheels.sh: error: the wheels take $size MiB, more than 60; name fewer packages" >&2
    exit 2
fi
rm -rf "$out"
mkdir -p "$(dirname "$out")"
mv "$work/wheels" "$out"
echo "$out: $(find "$out" -name '*.whl' | wc -l) wheels for Python $version, $size MiB"
