"""What a tokenizer is validated with, in small."""

import torch
from torchvision.models import vgg16
from training_runs import image_shards, prepare

FEW_IMAGES = 5


def validation_data(folder):
    """Folder with a recipe and 11 validation images (few/: 5), the arguments that name them, and a file of VGG16's
    weights.
    """
    arguments = prepare(folder)["tokenizer"]
    image_shards(folder / "few", FEW_IMAGES)
    with torch.device("meta"):
        shapes = {f"features.{name}": value.shape for name, value in vgg16().features.state_dict().items()}
    stream = torch.Generator().manual_seed(0)
    torch.save({name: torch.randn(shape, generator=stream) * (2 / shape[1:].numel()) ** 0.5 / 2
                for name, shape in shapes.items()}, folder / "vgg.pth")
    return folder, arguments
