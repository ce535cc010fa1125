"""What run_all.py runs: settings that give figures in about 20 minutes on two cores, and the smallest that still run
all.
"""

from __future__ import annotations

import importlib.util
import shlex
from dataclasses import dataclass

# What loader_data.py takes its photographs from.
_PHOTOGRAPHS = ("skimage", "sklearn", "matplotlib")
_SMALL_TOKENIZER = ("--phase adversarial --repeats 1 --warm-up 0 model.image_size=64 model.latent_tokens=16 "
                    "model.semantic_head=null loss.semantic=null")


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A script of this folder, its options, and what it needs; scripts find out by themselves what else is absent."""

    script: str
    measures: str
    options: str = ""
    quick: str = ""
    minutes: float  # of the options on two cores of a server CPU, roughly
    gpus: int = 0
    packages: tuple[str, ...] = ()

    def words(self, *, quick: bool) -> list[str]:
        return shlex.split(self.quick if quick else self.options)

    def missing(self, gpus: int) -> str | None:
        """Why this cannot be run where there are so many GPUs; None when it can."""
        if gpus < self.gpus:
            return f"needs {self.gpus} GPU{'s' * (self.gpus > 1)}; torch sees {gpus or 'none'}"
        absent = [package for package in self.packages if importlib.util.find_spec(package) is None]
        return f"needs {', '.join(absent)}: pip install 'gigatok_ds[test]'" if absent else None


BENCHMARKS = {
    "quantizer": Benchmark(
        script="quantizer.py",
        measures="nearest code and entropy loss, beside the original's formulation and plain PyTorch",
        options="--quick",
        quick="--quick --repeats 1 --seconds 0 --threads 1 --latents 1024",
        minutes=2.5,
    ),
    "cross-entropy": Benchmark(
        script="cross_entropy.py",
        measures="the GPT head's loss in chunks, beside all logits in float32",
        # Where a CPU has no bfloat16 of its own, bf16 would measure how that is imitated.
        options="--precision fp32",
        quick="--precision fp32 --sequences 1 --width 64 --threads 1",
        minutes=1,
    ),
    "loader": Benchmark(
        script="loader.py",
        measures="images per second and core, beside torchvision and webdataset",
        options="--images 800",
        quick="--images 32 --rounds 1 --workers 1 --batch 8 --samples 1000",
        minutes=3,
        packages=("webdataset", "torchvision", *_PHOTOGRAPHS),
    ),
    "sampling": Benchmark(
        script="sampling.py",
        measures="codes per second, beside a direct key/value-cache loop",
        options="--steps 60",
        quick="--batch 1 --steps 2 --repeats 1 --threads 1",
        minutes=2,
    ),
    "tokenizer-step": Benchmark(
        script="tokenizer_step.py",
        measures="a training step of either phase, beside plain eager torch",
        options="--zero 0 --repeats 3",
        quick=f"--zero 0 --threads 1 {_SMALL_TOKENIZER}",
        minutes=8,
        packages=("deepspeed", "megatron", "torchvision", "timm"),
    ),
    "convolution": Benchmark(
        script="convolution.py",
        measures="3x3 convolutions by Winograd's transform, beside torch's own",
        quick="--repeats 1 --threads 1 --sides 64",
        minutes=0.5,
    ),
    "optimizer": Benchmark(
        script="optimizer.py",
        measures="an update of 64M parameters, beside torch's AdamW as it comes",
        quick="--repeats 1 --threads 1 --millions 1",
        minutes=0.5,
        packages=("deepspeed",),
    ),
    "zero-memory": Benchmark(
        script="zero_memory.py",
        measures="memory per rank of ZeRO 0 to 3, beside the theory",
        quick="--ranks 2 --stages 1",
        minutes=2,
        packages=("deepspeed", "megatron"),
    ),
    "convert": Benchmark(
        script="convert.py",
        measures="converting checkpoints, beside copying the same files",
        options="--recipe VQ_BL256",
        quick="--recipe GPT-B",
        minutes=2,
    ),
    "cuda-resources": Benchmark(
        script="cuda_resources.py",
        measures="registers and spills of the CUDA kernels (needs nvcc, no GPU)",
        quick="--arch 90",
        minutes=2,
    ),
    "gpu-roofline": Benchmark(
        script="gpu_roofline.py",
        measures="model FLOP utilisation on an H100, predicted by counting (needs no GPU)",
        options="--all",
        quick="GPT-B",
        minutes=8,
    ),
    # None of these has been run yet: no GPU.
    "quantizer-gpu": Benchmark(
        script="quantizer.py",
        measures="the same on a GPU, torch.compile among the references",
        options="--device cuda",
        quick="--device cuda --quick --repeats 1 --latents 1024",
        minutes=5,
        gpus=1,
    ),
    "cross-entropy-gpu": Benchmark(
        script="cross_entropy.py",
        measures="the same on a GPU",
        options="--device cuda",
        quick="--device cuda --sequences 1 --width 64",
        minutes=1,
        gpus=1,
    ),
    "sampling-gpu": Benchmark(
        script="sampling.py",
        measures="the same on a GPU, as a CUDA graph",
        options="--device cuda --dtype bfloat16 --compile --batch 32",
        quick="--device cuda --dtype bfloat16 --batch 1 --steps 2 --repeats 1",
        minutes=3,
        gpus=1,
    ),
    "tokenizer-step-gpu": Benchmark(
        script="tokenizer_step.py",
        measures="the same on a GPU",
        options="--precision bf16 --batch 32 --repeats 20 --warm-up 3 training.compile=default",
        quick=f"--precision bf16 {_SMALL_TOKENIZER}",
        minutes=5,
        gpus=1,
        packages=("deepspeed", "megatron", "torchvision", "timm"),
    ),
    "zero-memory-gpu": Benchmark(
        script="zero_memory.py",
        measures="the same on four GPUs",
        options="--size GPT-B",
        quick="--stages 1",
        minutes=3,
        gpus=4,
        packages=("deepspeed", "megatron"),
    ),
}

# Proofs that something holds for long, not ratios: run by themselves.
LONG = {
    "gpu_acceptance.py": "what works on a GPU, what is wrong and how fast it is (8 minutes)",
    "soak.py": "an hour of random faults, and the same bits as without them (75 minutes)",
    "photographs.py": "half an hour of training with every loss term (30 minutes)",
    "optimizer_curves.py": "AdamW and Muon on the same steps (10 minutes)",
}
