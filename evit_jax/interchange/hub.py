"""Downloads models by their name on the Hugging Face Hub into the cache of `huggingface_hub`.

`huggingface_hub` reads its environment variables when it is imported: HF_TOKEN, HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT.
It resumes an interrupted transfer, and renames a file in the cache only when it is complete.
"""

import contextlib
import errno
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from absl import logging

from evit_jax.interchange import weight_files
from evit_jax.runtime import storage

PREFIX, _TIMM, _PAGE = 'hf-hub:', 'timm/', 'https://huggingface.co/'
_NAME = re.compile(r'([\w.-]+/[\w.-]+)(?:@([\w./-]+))?', re.ASCII)
_COMMIT = re.compile(r'[0-9a-f]{40}')
_MAX_LISTED = 6  # maximum number of files in an error message


class HubModel(NamedTuple):
    """A model in the local cache."""

    folder: pathlib.Path  # folder of the files of one commit
    name: str             # hf-hub:ORG/NAME@COMMIT


class _Repository(NamedTuple):
    """A repository on the Hub at a revision."""

    name: str      # ORG/NAME
    revision: str  # branch, tag or commit

    def __str__(self) -> str:
        return f'{PREFIX}{self.name}@{self.revision}'

    @property
    def has_commit(self) -> bool:
        return bool(_COMMIT.fullmatch(self.revision))


def is_hub_name(path: str | os.PathLike) -> bool:
    """Returns True for a name on the Hub.

    It is `hf-hub:ORG/NAME[@REVISION]`, the address of the model's page, or `timm/NAME[@REVISION]` unless such a path
    exists.
    """
    text = os.fspath(path)
    return text.startswith((PREFIX, _PAGE)) or (text.startswith(_TIMM) and not storage.as_path(text).exists())


def pinned(name: str, recorded: str = '') -> str:
    """Returns a Hub name with the commit of its revision. It downloads the model if the name has no commit.

    Args:
      recorded: a name with a commit from an earlier call. It is returned if it belongs to the same name.
    """
    repository = _parse(name)
    if repository.has_commit:
        return str(repository)
    if recorded.startswith(f'{PREFIX}{repository.name}@') and _parse(recorded).has_commit:
        return recorded
    return download(name).name


def download(name: str) -> HubModel:
    """Downloads config, preprocessing and weights of a model, unless the cache has them.

    A name with a commit in the cache needs no network. If the Hub cannot be reached, the cached commit of the revision
    is used, with a warning.

    Args:
      name: see `is_hub_name`. The default revision is main.

    Raises:
      ValueError: the name has another form, or its repository changed during the download.
      FileNotFoundError: the repository or the revision does not exist, or has no supported weights.
      PermissionError: the repository is gated or the token is refused.
      ConnectionError: the Hub cannot be reached, and the cache lacks the model.
      OSError: the disk is full, or the cache cannot be written.
    """
    repository = _parse(name)
    if repository.has_commit and (folder := _cached(repository)):
        return _model(repository, folder)
    try:
        with _explained(repository, name):
            folder = _download(repository)
    except ConnectionError as error:
        if (folder := _cached(repository)) is None:
            raise ConnectionError(f'{error}, and the cache does not have it: repeat the command with access to the '
                                  'network') from error
        logging.warning('%s: its files in the cache are used', error)
    model = _model(repository, folder)
    logging.info('%s is %s in %s', name, model.name, model.folder)
    return model


def _parse(name) -> _Repository:
    text = os.fspath(name)
    text = text.removeprefix(_PAGE).rstrip('/') if text.startswith(_PAGE) else text.removeprefix(PREFIX)
    if not (match := _NAME.fullmatch(text)):
        raise ValueError(f'{name} is no name on the Hugging Face Hub: give {PREFIX}ORG/NAME or '
                         f'{PREFIX}ORG/NAME@REVISION')
    return _Repository(match[1], match[2] or 'main')


def _model(repository, folder):
    return HubModel(folder, str(repository._replace(revision=folder.name)))  # the folder is named after the commit


def _download(repository) -> pathlib.Path:
    """Downloads the files of a model. Returns their folder in the cache."""
    from huggingface_hub import HfApi  # imports in half a second; most commands do not need it
    api = HfApi(library_name='evit_jax')
    listed = [file.rfilename for file in api.model_info(repository.name, revision=repository.revision).siblings]

    def get(file):
        return pathlib.Path(api.hf_hub_download(repository.name, file, revision=repository.revision))

    files = [file for file in (weight_files.CONFIG, weight_files.PREPROCESSOR) if file in listed]
    paths = [get(file) for file in files] + _weights(repository, listed, get)
    folders = {path.parent for path in paths}
    if len(folders) > 1:
        raise ValueError(f'{repository} changed during the download: repeat the command')
    return folders.pop()


def _weights(repository, listed: Sequence[str], get: Callable[[str], pathlib.Path]) -> list[pathlib.Path]:
    """Downloads the preferred file of weights, or an index and its shards."""
    file = next((file for file in weight_files.WEIGHTS if file in listed), None)
    if file is None:
        others = sorted(file for file in listed if not file.endswith(('.md', '.gitattributes')))
        names = ', '.join(others[:_MAX_LISTED]) + f' and {len(others) - _MAX_LISTED} more' * (
            len(others) > _MAX_LISTED)
        raise FileNotFoundError(
            f'{repository} has none of {", ".join(weight_files.WEIGHTS)}; its files are {names or "none"}: give '
            f'another model, or download a file of weights (hf download {repository.name} FILE) and give its path')
    path = get(file)
    shards = weight_files.shards(path) if path.name.endswith('.index.json') else ()
    return [path, *(get(shard) for shard in shards)]


def _cached(repository) -> pathlib.Path | None:
    """Returns the folder of a complete model in the cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    def find(file):
        path = try_to_load_from_cache(repository.name, file, revision=repository.revision)
        return pathlib.Path(path) if isinstance(path, str) else None  # not a str if the file is known to be absent

    path = next(filter(None, map(find, weight_files.WEIGHTS)), None)
    if path is None:
        return None
    shards = weight_files.shards(path) if path.name.endswith('.index.json') else ()
    return path.parent if all(map(find, shards)) else None


@contextlib.contextmanager
def _explained(repository: _Repository, name: str) -> Iterator[None]:
    """Turns the errors of `huggingface_hub` into errors of one line with a way out."""
    from huggingface_hub import constants, errors
    page = f'{constants.ENDPOINT}/{repository.name}'
    try:
        yield
    except errors.GatedRepoError as error:
        raise PermissionError(f'{repository} is gated: accept its terms on {page}, and set HF_TOKEN to a token of your '
                              'account (or run hf auth login)') from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f'{page} has no revision {repository.revision}: give one of its branches, tags or '
                                'commits') from error
    except errors.RepositoryNotFoundError as error:
        local = '' if name.startswith(PREFIX) else f', and there is no local path {name}'
        raise FileNotFoundError(f'{page} does not exist or is private{local}: check the name; for a private model, set '
                                'HF_TOKEN (or run hf auth login)') from error
    except errors.OfflineModeIsEnabled as error:
        raise ConnectionError(f'{repository} is not downloaded, because HF_HUB_OFFLINE is set') from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise PermissionError(f'the Hub refuses access to {repository} (status {status}): set HF_TOKEN to a valid '
                                  f'token with access to {page}') from error
        raise ConnectionError(f'{page} answers with status {status}') from error
    except (errors.HTTPError, errors.LocalEntryNotFoundError) as error:  # errors of the connection
        reason = _reason(error.__cause__ or error)
        raise ConnectionError(f'{repository} cannot be downloaded from {constants.ENDPOINT} ({reason})') from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(f'{constants.HF_HUB_CACHE} has no space for {repository}: free space, or set HF_HOME to a '
                          'folder on another disk') from error
        if type(error) is not OSError or error.errno is not None:
            raise
        raise ConnectionError(f'the download of {repository} is incomplete ({_reason(error)})') from error


def _reason(error) -> str:
    return ' '.join(str(error).split()) or type(error).__name__
