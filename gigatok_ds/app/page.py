"""The page: Gradio's blocks, and which function each of them calls. What is computed is in views.py."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable
from pathlib import Path

from gigatok_ds.app import views
from gigatok_ds.app.models import Models
from gigatok_ds.app.uploads import SUFFIXES, Limits, read_upload
from gigatok_ds.errors import InputError

TITLE = "GigaTok: codes and samples"
WAITING = 16  # requests in the queue; a further one is told to try again
KEPT_SECONDS = 3600  # of uploads and pictures
SIDE, SAMPLE_SIDE = 256, 96  # to at least so many pixels a small picture and one of many are enlarged
_FILLER = (
    "Every code from number n on is replaced by the code that a **mid-grey image** has at its place, for a tokenizer "
    "has no code that means nothing. It was not trained to do without its last codes, so a picture from few codes "
    "shows which part of the image they carry, not a preview of it."
)
_SWAP = (
    "Codes at positions *from*, ..., *to* - 1 of the two images are exchanged: what moves along with them is what they "
    "stand for. From 0 to the number of codes, each becomes the other's reconstruction."
)
_STRIP = ("Each square is a code, in their order; codes whose vectors are close have similar colours "
          "(the codebook's first three principal components).")


class Actions:
    """What the page's events do with the models, one method for each event. InputErrors become messages."""

    def __init__(self, models: Models, limits: Limits):
        self.models, self.limits = models, limits

    def read(self, path: str | None):
        """An upload's encoding for later events, its picture, reconstruction, difference, strip, codes, and a sentence.
        """
        if path is None:
            return (None,) * 7
        image = views.encoded(self.models.tokenizer, read_upload(Path(path), self.limits))
        codes = " ".join(map(str, image.codes.tolist()))
        said = (f"PSNR {image.psnr:.2f} dB; {len(set(image.codes.tolist()))} different codes among {len(image.codes)}. "
                + _STRIP)
        distance = views.difference(image.picture, image.reconstruction)
        pictures = map(self._shown, (image.picture, image.reconstruction, distance))
        return image, *pictures, self._strip(image.codes), codes, said

    def read_other(self, path: str | None):
        """The second upload's encoding, and its reconstruction."""
        if path is None:
            return None, None
        image = views.encoded(self.models.tokenizer, read_upload(Path(path), self.limits))
        return image, self._shown(image.reconstruction)

    def keep_first(self, image: views.Encoded | None, count: int):
        """The picture of the first `count` codes, and their strip."""
        if image is None:
            return None, None
        codes = views.keep_first(image.codes, int(count), self.models.neutral)
        return self._decoded(codes), self._strip(codes)

    def swap(self, image: views.Encoded | None, other: views.Encoded | None, first: int, last: int):
        """Both pictures with a range of codes exchanged, each with its strip."""
        if image is None or other is None:
            return (None,) * 4
        ours, theirs = views.swapped(image.codes, other.codes, int(first), int(last))
        return self._decoded(ours), self._strip(ours), self._decoded(theirs), self._strip(theirs)

    def sample(self, classes: list[int], per_class: int, guidance: float, temperature: float, top_k: int, seed: int):
        """The grid of samples; a setting whose field is empty is None, which is refused."""
        for name, value in (("guidance", guidance), ("temperature", temperature)):
            if value is None:
                raise InputError(f"{name} is not set; give a number")
        for name, value in (("images of each class", per_class), ("top-k", top_k), ("seed", seed)):
            if value is None or value != int(value):
                raise InputError(f"{name} is {value}; give a whole number")
        assert self.models.gpt is not None, "there is nothing to sample from"
        grid = views.samples(self.models.gpt, self.models.tokenizer, classes, per_class=int(per_class),
                             guidance=guidance, temperature=temperature, top_k=int(top_k), seed=int(seed))
        return self._shown(grid, SAMPLE_SIDE)

    def _shown(self, picture, least: int = SIDE):
        return views.enlarged(picture, self.models.tokenizer.config.image_size, least)

    def _decoded(self, codes):
        return self._shown(views.decoded(self.models.tokenizer, codes))

    def _strip(self, codes):
        return views.strip(codes, self.models.colours)


def build_page(models: Models, limits: Limits):
    """The gradio.Blocks of these models. Computes one request at a time; WAITING more may wait."""
    import gradio as gr

    actions = Actions(models, limits)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(KEPT_SECONDS // 10, KEPT_SECONDS)) as page:
        gr.Markdown(f"# {TITLE}\n{_describe(models)}")
        with gr.Tab("An image's codes"):
            _images_tab(gr, actions)
        with gr.Tab("Samples"):
            if models.gpt is None:
                gr.Markdown("There is no GPT among the checkpoints that this page was started with.")
            else:
                _samples_tab(gr, actions)
    return page.queue(max_size=WAITING, default_concurrency_limit=1)


def _describe(models: Models) -> str:
    config = models.tokenizer.config
    text = (f"A tokenizer of {config.image_size} x {config.image_size} images: {config.latent_tokens} codes from a "
            f"codebook of {config.quantizer.codebook_size:,}.")
    if models.gpt is not None:
        text += f" A generator of {models.gpt.config.num_classes:,} classes."
    return text + " Everything is computed on the machine that serves this page."


def _images_tab(gr, actions: Actions) -> None:
    image, other = gr.State(), gr.State()
    upload, read_panels = _image_section(gr, actions.limits)
    tokens = actions.models.tokenizer.config.latent_tokens
    count, kept_panels = _first_section(gr, tokens)
    other_upload, other_restored, ends, swap_panels = _swap_section(gr, tokens)

    keep = dict(fn=_with_messages(gr, actions.keep_first), inputs=[image, count], outputs=kept_panels,
                api_name="keep_first")
    swap = dict(fn=_with_messages(gr, actions.swap), inputs=[image, other, *ends], outputs=swap_panels, api_name="swap")
    read = _on(upload.change, fn=_with_messages(gr, actions.read), inputs=[upload], outputs=[image, *read_panels],
               api_name="read", show_progress_on=read_panels[:1])
    _on(_on(read.success, **keep).success, **swap)
    _clear(read, [upload, image, *read_panels, *kept_panels, *swap_panels])
    read_other = _on(other_upload.change, fn=_with_messages(gr, actions.read_other), inputs=[other_upload],
                     outputs=[other, other_restored], api_name="read_other", show_progress_on=[other_restored])
    _on(read_other.success, **swap)
    _clear(read_other, [other_upload, other, other_restored, *swap_panels])
    _on(count.change, **keep, trigger_mode="always_last")
    for end in ends:
        _on(end.change, **swap, trigger_mode="always_last")


def _image_section(gr, limits: Limits):
    """The upload, and the panels of `Actions.read`."""
    gr.Markdown(f"Drop a JPEG, PNG or WebP file of at most {limits.megabytes:g} MB and {limits.megapixels:g} "
                "megapixels. The largest square in the middle of it, resized, is what the tokenizer sees.")
    with gr.Row():
        upload = _upload(gr, "Image", "upload")
        pictures = [_picture(gr, title, name) for title, name in (
            ("What the tokenizer sees", "picture"), ("Reconstruction", "reconstruction"),
            (f"Difference, {views.DIFFERENCE_GAIN} x as bright", "difference"))]
    strip, said = _strip(gr, "Its codes", "strip"), gr.Markdown(elem_id="said")
    numbers = gr.Textbox(label="Its codes as numbers", interactive=False, lines=1, max_lines=4, elem_id="codes")
    return upload, [*pictures, strip, numbers, said]


def _first_section(gr, tokens: int):
    """The number of codes to keep, and the panels of `Actions.keep_first`."""
    gr.Markdown(f"## Only the first n codes\n{_FILLER}")
    with gr.Row():
        count = gr.Slider(0, tokens, value=tokens // 2, step=1, label="n", elem_id="count")
        return count, [_picture(gr, "From the first n codes", "kept"), _strip(gr, "The codes of that", "kept-strip")]


def _swap_section(gr, tokens: int):
    """The second upload and its panel, both ends of the exchanged codes, and the panels of `Actions.swap`."""
    gr.Markdown(f"## Exchange codes with a second image\n{_SWAP}")
    with gr.Row():
        upload = _upload(gr, "Second image", "other-upload")
        restored = _picture(gr, "The second image's reconstruction", "other-reconstruction")
        with gr.Column():
            ends = [gr.Slider(0, tokens, value=value, step=1, label=label, elem_id=name) for label, name, value in (
                ("from", "first", 0), ("to (not included)", "last", tokens // 2))]
    panels = []
    with gr.Row():
        for title, name in (("First image with the second's codes", "ours"),
                            ("Second image with the first's codes", "theirs")):
            with gr.Column():
                panels += [_picture(gr, title, name), _strip(gr, "Its codes", f"{name}-strip")]
    return upload, restored, ends, panels


def _samples_tab(gr, actions: Actions) -> None:
    names = list(actions.models.class_names)
    with gr.Row():
        classes = gr.Dropdown([(name, label) for label, name in enumerate(names)],
                              value=list(range(min(4, len(names)))),
                              multiselect=True, label="Classes, a row for each", elem_id="classes")
        per_class = gr.Slider(1, 16, value=8, step=1, label="Images of each class",
                              info=f"at most {views.MAX_SAMPLES} images in all")
    with gr.Row():
        guidance = gr.Slider(1, views.MAX_GUIDANCE, value=1.75, step=0.05, label="Guidance scale", info="1 is none")
        temperature = gr.Slider(0, views.MAX_TEMPERATURE, value=1, step=0.05, label="Temperature", info="0 is greedy")
        top_k = gr.Number(0, precision=0, label="Top-k", info="the k likeliest codes; 0 is all")
        seed = gr.Number(0, precision=0, label="Seed", info="the same seed, the same images", elem_id="seed")
    draw = gr.Button("Draw samples", variant="primary", elem_id="draw")
    grid = _picture(gr, "Samples", "samples", height=None)
    _on(draw.click, fn=_with_messages(gr, actions.sample),
        inputs=[classes, per_class, guidance, temperature, top_k, seed], outputs=[grid], api_name="sample")


def _upload(gr, label: str, name: str):
    """Not gradio.Image, which decodes whatever was uploaded before this program sees it."""
    return gr.File(label=label, file_types=list(SUFFIXES), height=SIDE, elem_id=name)


def _picture(gr, title: str, name: str, height: int | None = SIDE, buttons: tuple[str, ...] = ("download",)):
    """A picture with its title above, for Gradio's labels cover a corner of it."""
    with gr.Column(min_width=200):
        gr.Markdown(title)
        return gr.Image(format="png", interactive=False, height=height, show_label=False, buttons=list(buttons),
                        elem_id=name)


def _strip(gr, title: str, name: str):
    return _picture(gr, title, name, height=None, buttons=())


def _on(event: Callable, **settings):
    """Events wait for one another: there is one model, and a second computation at a time would slow both."""
    return event(**settings, concurrency_limit=1, concurrency_id="models", show_progress="minimal")


def _clear(event, outputs: list) -> None:
    """Clear, after a refused upload, it and what an earlier one left, so that another can be dropped."""
    event.failure(lambda: (None,) * len(outputs), outputs=outputs, show_progress="hidden", api_visibility="private")


def _with_messages(gr, action: Callable) -> Callable:
    """The action with InputErrors as messages on the page, which stay until they are closed."""

    @functools.wraps(action)
    def with_messages(*inputs):
        try:
            return action(*inputs)
        except InputError as error:
            # A message may hold a file's name, and Gradio takes it for HTML.
            raise gr.Error(html.escape(str(error), quote=False), duration=None, print_exception=False) from None

    return with_messages
