"""A directory to the Hugging Face Hub, by huggingface_hub: it finds the token, which passes through no code here."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from tsqlora.errors import SettingsError, TsqLoraError


def require_repository(repo: str) -> None:
    """Raises SettingsError for what is no name of a repository, before anything is written."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise SettingsError(f"--push-to-hub {repo}: {str(error).splitlines()[0].rstrip('.')}") from None


def push(folder: Path, repo: str) -> str:
    """Uploads a directory as one commit; its address.  The repository is made where there is none, and is private.

    Raises TsqLoraError where the hub refuses or cannot be reached; the directory stays.
    """
    api = HfApi()
    try:
        whole = api.create_repo(repo, private=True, exist_ok=True).repo_id  # with its owner
        done = api.upload_folder(repo_id=whole, folder_path=folder, commit_message="Upload adapter")
    except HfHubHTTPError as error:
        raise _not_pushed(folder, repo, f"the hub answers {error.response.status_code}") from None
    except OfflineModeIsEnabled:
        raise _not_pushed(folder, repo, "HF_HUB_OFFLINE is set") from None
    except Exception as error:  # most often of the connection; whatever it is, the directory is written and named
        said = str(error).strip().splitlines()
        raise _not_pushed(folder, repo, ": ".join([type(error).__name__, *said[:1]])) from None
    return str(done.commit_url)


def _not_pushed(folder: Path, repo: str, why: str) -> TsqLoraError:
    return TsqLoraError(
        f"{folder} is written, and was not pushed to {repo} ({why}); log in with `hf auth login`, then "
        f"`hf upload {repo} {folder}`"
    )
