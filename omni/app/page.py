"""The page and its events, in gradio."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from omni.fusion.modeling_omni import OmniForConditionalGeneration
from omni.fusion.processing_omni import OmniProcessor
from omni.loading.checkpoint import ADAPTERS
from omni.looking.attention import AttentionError
from omni.session import QuestionError
from omni.vision.pictures import read_picture

from . import markup
from .visit import Visit

EXAMPLES = Path(__file__).parents[2] / "examples"
QUESTIONS = {"scene.png": "what is below the heart", "second.png": "describe the picture"}
"""About pictures of the repository, where omni is used from one."""

COLORS = ["#e6194b", "#f58231", "#ffe119", "#3cb44b", "#42d4f4", "#4363d8", "#911eb4", "#000000"]
"""To draw with."""

SWEEP, KEEP = 30, 120
"""Every so many seconds, uploads that are older than so many are deleted. They are read into memory when they come."""

CLICKS = """
element.addEventListener('click', event => {
    const button = event.target.closest('button');
    if (button) trigger('select', {...button.dataset});
});
"""
"""A button of ours says by its data- attributes what was chosen."""

TO_PICTURES = "() => document.querySelector('.pictures')?.scrollIntoView({block: 'nearest', behavior: 'smooth'})"
"""On a narrow page the pictures stand above the answer, perhaps out of sight."""


def mount(app: FastAPI, model: OmniForConditionalGeneration, processor: OmniProcessor) -> None:
    """Put the page at the root of an application."""
    gr.mount_gradio_app(
        app,
        _page(model, processor),
        path="/",
        theme=gr.themes.Base(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
        css_paths=Path(__file__).with_name("page.css"),
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size="100mb",
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
    )


def _page(model: OmniForConditionalGeneration, processor: OmniProcessor) -> gr.Blocks:
    image_processor = processor.preprocessors.get("image")
    sees = image_processor is not None
    shown = [name for name in QUESTIONS if (EXAMPLES / name).is_file()] if sees else []
    name = str(model.config.name_or_path)
    merged = (Path(name) / ADAPTERS).is_file()  # the fingerprints are of the weights before
    header = markup.header(name, model.num_parameters(), None if merged else model.config.fingerprints)

    with gr.Blocks(title="omni", analytics_enabled=False, delete_cache=(SWEEP, KEEP)) as page:
        visit = gr.State(Visit())
        gr.HTML(header, apply_default_css=False)
        with gr.Row(equal_height=False):
            with gr.Column(min_width=320, visible=sees):
                with gr.Tabs():
                    with gr.Tab("Upload"):
                        uploads = gr.File(file_count="multiple", file_types=["image"], show_label=False, height=130)
                        examples = gr.HTML(
                            markup.examples([(read_picture(EXAMPLES / each), QUESTIONS[each]) for each in shown]),
                            js_on_load=CLICKS,
                            apply_default_css=False,
                        )
                    with gr.Tab("Draw"):
                        canvas = gr.ImageEditor(
                            type="pil",
                            canvas_size=(448, 448),
                            fixed_canvas=True,
                            sources=(),
                            transforms=(),
                            layers=False,
                            brush=gr.Brush(default_size=16, colors=COLORS),
                            buttons=[],
                            show_label=False,
                        )
                        drawn = gr.Button("Use the drawing")
                together = gr.Checkbox(label="Several pictures: add to those below", elem_classes="plain")
                pictures = gr.HTML(js_on_load=CLICKS, apply_default_css=False)
            with gr.Column(min_width=320):
                question = gr.Textbox(
                    label="Question", placeholder="what color is the circle", submit_btn="Ask", max_lines=4
                )
                notice = gr.HTML(apply_default_css=False)
                answer = gr.HTML(markup.welcome(), js_on_load=CLICKS, apply_default_css=False)

        def all_of(visit: Visit, refused: Sequence[str] = ()) -> dict[Any, Any]:
            """What the page shows of a visit."""
            return {
                pictures: markup.pictures(visit),
                answer: markup.answered(visit),
                notice: markup.notice(refused),
            }

        def choose(visit: Visit, files: list[str], together: bool) -> dict[Any, Any]:
            given = [(Path(path).name, Path(path).read_bytes()) for path in files]
            return {uploads: None, **all_of(visit, visit.choose(given, image_processor, together))}

        def draw(visit: Visit, drawing: dict[str, Any] | None, together: bool) -> dict[Any, Any]:
            if drawing is None or drawing["composite"] is None:
                return all_of(visit, ["There is no drawing yet; draw something, and use it then."])
            return all_of(
                visit, visit.choose([("drawing", markup.png(drawing["composite"]))], image_processor, together)
            )

        def pick(visit: Visit, together: bool, event: gr.EventData) -> dict[Any, Any]:
            name = shown[int(event.pick)]
            refused = visit.choose([(name, (EXAMPLES / name).read_bytes())], image_processor, together)
            return {question: QUESTIONS[name], **all_of(visit, refused)}

        def remove(visit: Visit, event: gr.EventData) -> dict[Any, Any]:
            visit.remove(int(event.remove))
            return all_of(visit)

        def ask(visit: Visit, question: str) -> Iterator[dict[Any, Any]]:
            try:
                yield {notice: "", answer: markup.waiting(), pictures: markup.pictures(visit)}
                for each in visit.ask(question, model, processor):
                    yield {answer: markup.answered(visit) if each.seconds else markup.writing(each)}
            except QuestionError as error:
                yield {notice: markup.notice([str(error)]), answer: ""}

        def look(visit: Visit, event: gr.EventData) -> dict[Any, Any]:
            try:
                visit.look(int(event.word))
            except AttentionError as error:
                return {notice: markup.notice([str(error)])}
            return all_of(visit)

        everything = [pictures, answer, notice]
        thinking: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}
        uploads.upload(
            choose, [visit, uploads, together], [uploads, *everything], show_progress="hidden", api_name="choose"
        )
        drawn.click(draw, [visit, canvas, together], everything, show_progress="hidden", api_name="draw")
        examples.select(pick, [visit, together], [question, *everything], show_progress="hidden", api_name="pick")
        pictures.select(remove, [visit], everything, show_progress="hidden", api_name="remove")
        question.submit(ask, [visit, question], everything, api_name="ask", **thinking)
        answer.select(look, [visit], everything, api_name="look", **thinking).then(js=TO_PICTURES)
    return page
