"""`a2d push`: a converted checkpoint to the Hugging Face Hub."""

import argparse
from typing import Any

from ..console import Console
from ..errors import A2DError, BadInput, first_sentence


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command to the parser of `a2d`."""
    parser = subparsers.add_parser(
        "push",
        help="upload a converted checkpoint to the Hub",
        description="Uploads a converted checkpoint with its card, manifest, code and tokenizer to the Hugging Face "
        "Hub, as whoever is logged in (`hf auth login`).",
    )
    parser.add_argument("run_or_model", metavar="RUN", help="run directory, or folder of a converted checkpoint")
    parser.add_argument("repo_id", metavar="REPO", help="where to: name, user/name or organisation/name")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--message", default="Converted with a2d_hf", help="message of the commit")
    parser.add_argument("--json", action="store_true", help="print a JSON object on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    from ..converted_model import find_converted
    from ..model_card import push_checkpoint

    console = Console(json_output=args.json)
    checkpoint = find_converted(args.run_or_model)
    try:
        address = push_checkpoint(
            checkpoint.path, args.repo_id, private=True if args.private else None, message=args.message
        )
    except HFValidationError as error:
        raise BadInput(f"REPO {args.repo_id!r} is no name of a repository: {first_sentence(error)}") from error
    except LocalTokenNotFoundError as error:
        raise BadInput("You are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN.") from error
    except OfflineModeIsEnabled as error:
        raise BadInput("HF_HUB_OFFLINE is set: unset it to upload.") from error
    except HfHubHTTPError as error:
        raise _refused(args.repo_id, error) from error
    except A2DError:
        raise
    except Exception as error:  # no network: each layer below has exceptions of its own
        raise A2DError(f"The Hub could not be reached, and nothing was published: {first_sentence(error)}") from error
    if args.json:
        console.json({"model": str(checkpoint.path), "repository": args.repo_id, "commit": address})
    else:
        console.line(f"Uploaded {checkpoint.path} as {address}")
    return 0


def _refused(repo_id: str, error: Any) -> A2DError:
    status = error.response.status_code
    if status in (401, 403):
        return BadInput(
            f"The Hub does not let you write to {repo_id}: run `hf auth login` with a token that may write there."
        )
    return A2DError(f"The Hub refused the upload to {repo_id} with status {status}: {first_sentence(error)}")
