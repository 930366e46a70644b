"""The page of `a2d sample --trace`: a text that the reader runs forwards and backwards through its denoising.

Owns the scrubbable picture, HTML and CSS without a script; the still ones are in denoising_picture.py. Writes no file.
"""

from collections.abc import Sequence

from markupsafe import Markup

from . import report
from .denoising_picture import Denoising, between, denoising_grid, denoising_legend, shade_of


# `--now` is the pass shown: the one whose radio button is checked, or whose cell the pointer is over. A token shows
# once its own pass, `--at`, has come: the difference of the two, cut off at 0 and 1, is its opacity.
STYLE = Markup("""<style>
.scrub .strip { display: flex; height: 1.6rem; margin: .4rem 0 .2rem; touch-action: none; }
.scrub .strip label { flex: 1 1 0; min-width: 1px; background: var(--when); opacity: .35; cursor: ew-resize; }
.scrub .strip label:hover { opacity: 1; }
.scrub input { position: absolute; opacity: 0; pointer-events: none; }
.scrub .tok { background: color-mix(in srgb, var(--blank) calc(100% * (1 - var(--shown))), transparent); }
.scrub .tok { --shown: clamp(0, calc(var(--now) - var(--at) + 1), 1); }
.scrub .tok > span { opacity: var(--shown); }
</style>""")


def scrubbable(denoising: Denoising, *, name: str) -> Markup:
    """
    The text at any of its passes: move along the strip, or click it and use the arrow keys.

    Args:
        denoising ([`Denoising`]): what to show.
        name (`str`): an id, unique on the page.

    Returns:
        `Markup`
    """
    count = denoising.num_steps
    passes = range(count + 1)
    rules = Markup("\n").join(
        Markup(
            "#{0}:has(#{0}-{1}:checked) {{ --now: {1} }} #{0}:has([for={0}-{1}]:hover) {{ --now: {1} !important }} "
            "#{0}:has(#{0}-{1}:checked) [for={0}-{1}] {{ opacity: 1 }}"
        ).format(name, number)
        for number in passes
    )
    radios = Markup("").join(
        Markup('<input type="radio" name="{0}" id="{0}-{1}"{2} aria-label="after {1} of {3} passes">').format(
            name, number, Markup(" checked") if number == count else "", count
        )
        for number in passes
    )
    strip = Markup("").join(
        Markup('<label for="{}-{}" class="t{}" title="after {} of {} passes"></label>').format(
            name, number, shade_of(max(number, 1), count), number, count
        )
        for number in passes
    )
    tokens = [
        Markup('<span class="tok t{}" style="--at:{}" title="{}"><span>{}</span></span>').format(
            shade_of(step, count), step, f"pass {step} of {count}, probability {confidence:.2f}", piece
        )
        for piece, step, confidence in zip(denoising.pieces, denoising.steps, denoising.confidence, strict=True)
    ]
    return Markup(
        '<style>{rules}</style><div class="scrub" id="{name}">{radios}<div class="strip">{strip}</div>'
        '<div class="sample"><span class="prompt">{prompt}</span>{tokens}</div></div>'
    ).format(
        rules=rules, name=name, radios=radios, strip=strip, prompt=denoising.prompt, tokens=between(denoising, tokens)
    )


def trace_page(denoisings: Sequence[Denoising], model: str) -> str:
    """
    The whole document, one section per text.

    Args:
        denoisings (`Sequence[Denoising]`): the texts.
        model (`str`): what the user calls the model.
    """
    sections = []
    for number, denoising in enumerate(denoisings):
        body = [
            STYLE if number == 0 else Markup(""),
            report.figure(
                scrubbable(denoising, name=f"text{number}"),
                "Move along the strip to see the text after each pass; click it for the arrow keys. Point at a token "
                "for its pass and probability.",
            ),
            denoising_legend(),
            report.figure(denoising_grid(denoising), "When each position was filled."),
        ]
        title = denoising.prompt.strip().split("\n")[0][:60] or "From nothing"
        sections.append(report.Section(title, report.join(*body)))
    tokens, passes = sum(len(each.pieces) for each in denoisings), sum(each.num_steps for each in denoisings)
    tiles = [
        report.Tile(str(tokens), "tokens written"),
        report.Tile(str(passes), "forward passes"),
        report.Tile(f"{tokens / max(passes, 1):.2f}", "tokens per pass"),
    ]
    lead = (
        f"How {model} wrote: every position starts as a blank, and each pass fills those that the model is surest of."
    )
    return report.page("How the text came to be", lead, sections, tiles=tiles)
