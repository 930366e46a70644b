"""How a recipe ends: a sentence and exit code 2 for what the user can mend, a traceback for what is a defect.

Owns the start of the scripts in recipes/. Everything that they do is theirs.
"""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from .console import Console
from .errors import A2DError, BadInput, first_sentence


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
        main(*_parsed(parser))
    except A2DError as error:
        console.error(str(error))
        return error.exit_code
    except OSError as error:
        # A model or a file that is not there, a full disk: the libraries' first line says which.
        console.error(first_sentence(error))
        return BadInput.exit_code
    except (ValueError, TypeError) as error:
        if not _raised_here(error):
            raise
        console.error(str(error))
        return BadInput.exit_code
    except (FloatingPointError, RuntimeError) as error:
        # No numbers any more, or out of memory (a RuntimeError of torch's): the trainers say what to change.
        if not _raised_here(error):
            raise
        console.error(str(error))
        return A2DError.exit_code
    except KeyboardInterrupt:
        console.error("interrupted; with --resume_from_checkpoint true it goes on from the last checkpoint.")
        return 130
    return 0


def _parsed(parser: Any) -> tuple[Any, ...]:
    """What the parser returns; whatever it cannot take is the user's, wherever it was noticed."""

    def refuse(message: str) -> NoReturn:
        raise BadInput(f"The arguments cannot be used: {message}.")

    parser.error = refuse  # instead of a screenful of usage
    try:
        return parser.parse_args_and_config()
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
        raise BadInput(f"The arguments cannot be used: {' '.join(str(error).split())}") from error


def _raised_here(error: BaseException) -> bool:
    """Whether an error is one of this project's own, whose text says what to do."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and any(Path(frames[-1].filename).resolve().is_relative_to(house) for house in HOUSES)
