"""What a click in the explorer costs: until the picture's HTML is there, and, run by itself, until a browser shows it.

`python -m tests.benchmarks.exploring` needs gradio, playwright and a chromium, and runs on Linux.
"""

import json
import re
import shutil
import statistics
import time
from pathlib import Path

import torch
from transformers import Dinov2Config, Dinov2Model, ViTImageProcessorPil

from soap_hf import SOAPModelWrapper, SOAPStatistics
from soap_hf.explore import Choice, Explorer, Session, colour_view, object_view, read_photo, similarity_view
from soap_hf.explore.html import view_html
from tests.benchmarks.timing import Comparison, medians

PHOTOS = sorted((Path(__file__).parents[2] / "examples" / "photos" / "heldout").glob("*.jpg"))[:2]
SIZE, INTERACTIONS = 224, 200


def small_head() -> SOAPModelWrapper:
    """ViT-S/14 of random weights under a head with statistics of random tokens."""
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=SIZE, patch_size=14)
    processor = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE})
    tokens = SOAPStatistics.from_tokens(*torch.randn(2, 8, 16, 16, 384))
    backbone = Dinov2Model(config).eval()
    model = SOAPModelWrapper.from_backbone(backbone, None, image_processor=processor, statistics=tokens)
    return model.reweight(8)


def explore_images() -> Comparison:
    """From a click, a stroke of the slider or another view to the HTML of the pictures of two photographs."""
    explorer, session, step = Explorer(small_head(), "ViT-S/14"), Session(), iter(range(10**6))
    for number, path in enumerate(PHOTOS):
        session = session.with_photo(number, read_photo(path))
    session = session.kept_at(explorer, -1).kept_at(explorer, -1, fine=True).with_axes(explorer, -1)

    def click() -> str:
        number = next(step)
        moment = session.with_query(number % 2, number % 16 / 16, 0.5).at(explorer, Choice(-1))
        return view_html(similarity_view(moment), moment)

    def slide() -> str:
        moment = session.at(explorer, Choice(-1, "soap", next(step) % 64))
        return view_html(similarity_view(moment), moment)

    def colours() -> str:
        moment = session.at(explorer, Choice(-1, "soap", next(step) % 64))
        return view_html(colour_view(moment), moment)

    def objects() -> str:
        moment = session.at(explorer, Choice(-1, "soap", next(step) % 64), fine=True)
        return view_html(object_view(moment), moment)

    candidates = {"click": click, "slider": slide, "slider, colours": colours, "slider, objects": objects}
    title = f"The explorer, ViT-S/14 at {SIZE} pixels on two photographs: to the pictures' HTML"
    return Comparison(title=title, seconds=medians(candidates, repeats=15), ratios={}, targets={})


def click_in_a_browser() -> None:
    """Medians until a browser has the new pictures, and the server's memory along the way, as JSON."""
    from playwright.sync_api import sync_playwright

    from soap_hf.explore.serving import served

    chromium = shutil.which("chromium")
    with served(Explorer(small_head(), "ViT-S/14"), PHOTOS) as address, sync_playwright() as running:
        page = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page()
        page.goto(address)
        page.wait_for_selector("img[data-image]")
        taken, memory = [], []
        for step in range(INTERACTIONS):
            taken.append(page.evaluate(CLICK, [step % 6, (step * 7 % 16 + 0.5) / 16, (step * 5 % 16 + 0.5) / 16]))
            if step % 50 == 49:
                memory.append(_resident())
        slides = [page.evaluate(SLIDE, str(step % 60)) for step in range(40)]
    times = {"click": taken, "slider": slides}
    found = {
        name: {"median ms": round(statistics.median(one)), "worst ms": round(max(one))} for name, one in times.items()
    }
    print(json.dumps({**found, "MB after every 50 clicks": memory, "threads": torch.get_num_threads()}, indent=2))


CHANGED = """
const pictures = () => [...document.querySelectorAll('img[data-image]')].map(image => image.src).join();
const changed = before => new Promise(done => {
  const look = () => pictures() !== before ? requestAnimationFrame(done) : requestAnimationFrame(look);
  look();
});
"""
CLICK = f"""async ([number, down, across]) => {{ {CHANGED}
  const image = document.querySelectorAll('img[data-image]')[number], box = image.getBoundingClientRect();
  const before = pictures(), start = performance.now();
  const place = {{clientX: box.left + across * box.width, clientY: box.top + down * box.height, bubbles: true}};
  image.dispatchEvent(new MouseEvent('click', place));
  await changed(before);
  return performance.now() - start;
}}"""
SLIDE = f"""async value => {{ {CHANGED}
  const slider = document.querySelector('input[type=range]'), before = pictures(), start = performance.now();
  slider.value = value;
  slider.dispatchEvent(new Event('input', {{bubbles: true}}));
  await changed(before);
  return performance.now() - start;
}}"""


def _resident() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) // 1024


if __name__ == "__main__":
    started = time.perf_counter()
    click_in_a_browser()
    print(f"{time.perf_counter() - started:.0f} s")
