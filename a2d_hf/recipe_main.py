"""How a recipe ends: a sentence and exit code 2 for what the user can mend, a traceback for what is a defect.

Owns the start of the scripts in recipes/. Everything that they do is theirs.
"""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .console import Console
from .errors import A2DError, BadInput


ROOT = Path(__file__).resolve().parent
# Side by side in the repository; inside this package in a wheel.
HOUSES = (ROOT, ROOT.parent / "modeling", ROOT.parent / "trainers")


def run_recipe(main: Callable[..., None], parser: Any) -> int:
    """
    Parses the command line and runs a recipe.

    Args:
        main (`Callable`): takes what the parser returns.
        parser (`trl.TrlParser`): of the recipe's arguments.

    Returns:
        `int`: 0 done, 1 failed with a sentence, 2 bad input, 130 interrupted.
    """
    console = Console()
    try:
        main(*parser.parse_args_and_config())
    except A2DError as error:
        console.error(str(error))
        return error.exit_code
    except (ValueError, TypeError) as error:
        if not _raised_here(error):
            raise
        console.error(str(error))
        return BadInput.exit_code
    except KeyboardInterrupt:
        console.error("interrupted; with --resume_from_checkpoint true it goes on from the last checkpoint.")
        return 130
    return 0


def _raised_here(error: BaseException) -> bool:
    """Whether an error is one of this project's own, whose text says what to do."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and any(Path(frames[-1].filename).resolve().is_relative_to(house) for house in HOUSES)
