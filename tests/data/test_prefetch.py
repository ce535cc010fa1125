"""Batches on their way to a device: none lost, none changed, and on a CPU none touched."""

import pytest
import torch
from small_models import small_tokenizer

from gigatok_ds import InputError
from gigatok_ds.data.prefetch import on_device


def numbered(count):
    for number in range(count):
        yield {"images": torch.full((4, 3, 64, 64), float(number)).pin_memory() if torch.cuda.is_available()
               else torch.full((4, 3, 8, 8), float(number)), "position": torch.tensor([number])}


def test_on_a_cpu_batches_pass_as_they_are_and_when_they_are_asked_for():
    made = []
    source = (made.append(batch) or batch for batch in numbered(3))
    batches = on_device(source, ("images",), torch.device("cpu"))
    assert not made
    assert next(batches) is made[0] and len(made) == 1
    assert [int(batch["position"]) for batch in batches] == [1, 2]


@pytest.mark.gpu
def test_on_a_gpu_every_batch_arrives_once_and_in_order():
    device, sums = torch.device("cuda", 0), []
    for batch in on_device(numbered(20), ("images",), device):
        assert batch["images"].is_cuda and not batch["position"].is_cuda
        for _ in range(5):  # keeps the computing stream busy, so that a copy could overtake it
            torch.mm(torch.randn(1024, 1024, device=device), torch.randn(1024, 1024, device=device))
        sums.append(batch["images"].mean())
    assert torch.stack(sums).tolist() == list(range(20))


@pytest.mark.gpu
def test_a_readers_error_comes_in_its_turn():
    def broken():
        yield from numbered(2)
        raise InputError("a bad shard")

    batches = on_device(broken(), ("images",), torch.device("cuda", 0))
    assert [int(next(batches)["position"]) for _ in range(2)] == [0, 1]
    with pytest.raises(InputError, match="a bad shard"):
        next(batches)


@pytest.mark.gpu
def test_a_tokenizers_passes_do_not_wait_for_the_gpu():
    device = torch.device("cuda", 0)
    tokenizer = small_tokenizer().to(device).train()
    images = torch.rand(2, 3, 16, 16, device=device)
    for attempt in range(2):  # the first may wait: libraries start, kernels are compiled
        torch.cuda.set_sync_debug_mode("error" if attempt else "default")
        try:
            output = tokenizer(images, entropy="global", semantic=True, direct=True)
            images_loss = output.reconstruction.mean() + output.direct_reconstruction.mean()
            (images_loss + sum(output.quantizer_losses)).backward()
            tokenizer.quantizer.record_usage(output.codes)
        finally:
            torch.cuda.set_sync_debug_mode("default")
