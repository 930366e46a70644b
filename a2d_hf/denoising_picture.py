"""The picture of a text being denoised: which token was filled in when, and how sure the model was.

Owns the drawing, given plain lists; knows nothing of models. Writes no file: it returns `Markup` for report.py's page.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from markupsafe import Markup


SHADES = 10  # colours between first and last step; report.html defines as many
ANIMATION_S = 6.0
CELL, GAP = 10, 1  # of the grid, in SVG units
SNAPSHOTS = 5


class Decodes(Protocol):
    """The one thing that is asked of a tokenizer."""

    def decode(self, token_ids: Sequence[int]) -> str: ...


@dataclass
class Denoising:
    """
    How one text came to be.

    Args:
        prompt (`str`): what was given.
        pieces (`list[str]`): the final text of each generated position; joined they are the generated text.
        steps (`list[int]`): for each position, the forward pass (from 1) at which it got its final token.
        confidence (`list[float]`): for each position, the probability in [0, 1] that the model gave that token then.
        num_steps (`int`): forward passes in all.
        given (`dict[int, str]`, *optional*): text that was given, by the number of the piece that it stands before;
            behind the last one it has the number of pieces.

    Raises:
        `ValueError`: lists of different lengths, or a step outside 1..num_steps.
    """

    prompt: str
    pieces: list[str]
    steps: list[int]
    confidence: list[float]
    num_steps: int
    given: dict[int, str] = field(default_factory=dict)

    def __post_init__(self):
        if not len(self.pieces) == len(self.steps) == len(self.confidence):
            raise ValueError(
                f"`pieces`, `steps` and `confidence` must be of one length, "
                f"not {len(self.pieces)}, {len(self.steps)} and {len(self.confidence)}."
            )
        if any(not 1 <= step <= self.num_steps for step in self.steps):
            raise ValueError(f"`steps` must lie between 1 and `num_steps` ({self.num_steps}).")


def token_pieces(tokenizer: Decodes, ids: Sequence[int]) -> list[str]:
    """
    The text that each token adds, so that the pieces joined are the text of all.

    A character may be spread over several byte-level tokens: it is shown at the token that completes it.

    Args:
        tokenizer: anything with `decode`.
        ids (`Sequence[int]`): token ids.

    Returns:
        `list[str]`: as many pieces as ids.
    """
    pieces, shown = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        if text.endswith("\ufffd") and end < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(shown) :])
        shown = text
    return pieces


def denoising_text(denoising: Denoising, *, name: str) -> Markup:
    """
    The final text, each token underlined in the colour of its step; it writes itself once when the page opens.

    Args:
        denoising (`Denoising`): what to show.
        name (`str`): an id, unique on the page, for the control that plays it again.

    Returns:
        `Markup`
    """
    spans = [
        Markup('<span class="tok t{}" style="--at:{}" title="{}">{}</span>').format(
            shade_of(step, denoising.num_steps),
            f"{ANIMATION_S * (step - 1) / denoising.num_steps:.2f}",
            f"step {step} of {denoising.num_steps}, probability {confidence:.2f}",
            piece,
        )
        for piece, step, confidence in zip(denoising.pieces, denoising.steps, denoising.confidence, strict=True)
    ]
    return Markup(
        '<div><input class="replay" type="checkbox" id="{name}"><label for="{name}">play again</label>'
        '<div class="sample"><span class="prompt">{prompt}</span>{spans}</div></div>'
    ).format(name=name, prompt=denoising.prompt, spans=between(denoising, spans))


def denoising_grid(denoising: Denoising) -> Markup:
    """
    Steps from top to bottom, positions from left to right: blank until filled, strong at the step that filled it.

    The cell of that step is the more opaque the surer the model was; below it the column stays faintly coloured.

    Returns:
        `Markup`: an `<svg>` element.
    """
    columns, rows = len(denoising.pieces), denoising.num_steps
    left, bottom = 34, 30
    width, height = left + columns * CELL, rows * CELL + bottom
    parts = [
        Markup('<rect class="blank" x="{}" y="0" width="{}" height="{}" opacity=".55"/>').format(
            left, columns * CELL, rows * CELL
        )
    ]
    for column, (piece, step, confidence) in enumerate(
        zip(denoising.pieces, denoising.steps, denoising.confidence, strict=True)
    ):
        shade, x, y = shade_of(step, rows), left + column * CELL, (step - 1) * CELL
        label = f"{piece.strip() or repr(piece)}: step {step}, probability {confidence:.2f}"
        if step < rows:
            parts.append(
                Markup('<rect class="t{}" x="{}" y="{}" width="{}" height="{}" opacity=".22"/>').format(
                    shade, x, y + CELL, CELL - GAP, (rows - step) * CELL
                )
            )
        parts.append(
            Markup(
                '<rect class="t{}" x="{}" y="{}" width="{}" height="{}" opacity="{}"><title>{}</title></rect>'
            ).format(shade, x, y, CELL - GAP, CELL - GAP, f"{0.4 + 0.6 * min(max(confidence, 0.0), 1.0):.2f}", label)
        )
    for step in sorted({1, (rows + 1) // 2, rows}):
        parts.append(
            Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(left - 6, max(step * CELL - 1, 15), step)
        )
    parts.append(Markup('<text x="{}" y="{}">positions in the text →   passes ↓</text>').format(left, height - 8))
    alt = f"{columns} positions filled in {rows} steps, one column per position"
    # A few positions are not blown up to the width of the page.
    svg = '<svg class="cells" style="max-width: {}px" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
    return Markup(svg).format(2 * width, width, height, alt, Markup("\n").join(parts))


def denoising_legend() -> Markup:
    """What the colours mean."""
    ramp = Markup("").join(Markup('<i class="t{}"></i>').format(shade) for shade in range(SHADES))
    return Markup(
        '<p class="legend"><span>filled in first<span class="ramp">{}</span>last</span>'
        '<span><i class="box"></i>still a blank</span><span>stronger = the model was surer</span></p>'
    ).format(ramp)


def denoising_snapshots(denoising: Denoising) -> Markup:
    """A few moments of the text, blanks shown as such, folded away until asked for."""
    moments = sorted({round(i * denoising.num_steps / (SNAPSHOTS - 1)) for i in range(SNAPSHOTS)})
    blocks = Markup("").join(
        Markup(
            '<p class="soft">after {} of {} steps</p><div class="sample"><span class="prompt">{}</span>{}</div>'
        ).format(moment, denoising.num_steps, denoising.prompt, text_after(denoising, moment))
        for moment in moments
    )
    return Markup("<details><summary>The same text at {} moments</summary>{}</details>").format(len(moments), blocks)


def text_after(denoising: Denoising, step: int) -> str:
    """
    The generated text as it stood after `step` forward passes.

    A blank keeps its line breaks and shows one `░` for each other character that will stand there.
    """
    shown = [
        piece if filled <= step else "".join("\n" if c == "\n" else "░" for c in piece)
        for piece, filled in zip(denoising.pieces, denoising.steps, strict=True)
    ]
    given = denoising.given
    return "".join(given.get(number, "") + piece for number, piece in enumerate(shown)) + given.get(len(shown), "")


def between(denoising: Denoising, spans: Sequence[Markup]) -> Markup:
    """The pictures of the pieces in their order, with the given text where it stands."""
    given = {number: Markup('<span class="prompt">{}</span>').format(text) for number, text in denoising.given.items()}
    parts = [given.get(number, Markup("")) + span for number, span in enumerate(spans)]
    return Markup("").join([*parts, given.get(len(spans), Markup(""))])


def shade_of(step: int, num_steps: int) -> int:
    """0 for the first step .. SHADES - 1 for the last."""
    return 0 if num_steps == 1 else round((step - 1) / (num_steps - 1) * (SHADES - 1))
