"""A small Hugging Face Hub on loopback, which serves files that a test makes."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote

import pytest
from huggingface_hub import constants

TOKEN = 'hf_secret'
_REDIRECTED = '.safetensors', '.bin'  # the Hub keeps large files on another host


class Repository(NamedTuple):
    """A repository of models on the Hub."""

    commits: dict[str, dict[str, bytes]]  # commit -> file name -> content
    refs: dict[str, str]                  # branch or tag -> commit
    gated: bool = False                   # its files are for users with a token only
    private: bool = False                 # it is visible to users with a token only


class Hub:
    """The contents and the log of the server."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []        # 'METHOD path' of each request
        self.ranges: list[str] = []          # Range headers of the requests
        self.cuts: dict[str, int] = {}       # file name -> number of transfers to cut in the middle
        self.status = 0                      # status of every answer; 0: as requested
        self.endpoint = ''

    def add(self, name: str, files: dict[str, bytes], commit: str = 'a' * 40, **options) -> None:
        """Adds a commit to a repository. The branch main then points to it."""
        old = self.repositories.get(name, Repository({}, {}))
        self.repositories[name] = Repository(old.commits | {commit: files}, old.refs | {'main': commit}, **options)


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    """Serves a hub without models until the end of the body."""
    hub = Hub()
    server = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (_Handler,), {'hub': hub}))
    server.daemon_threads = True
    hub.endpoint = f'http://127.0.0.1:{server.server_port}'
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def connect(patch: pytest.MonkeyPatch, endpoint: str, cache) -> None:
    """Makes `huggingface_hub` of this process use a server and a cache, as HF_ENDPOINT and HF_HOME do at its import."""
    patch.setattr(constants, 'ENDPOINT', endpoint)
    patch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', endpoint + '/{repo_id}/resolve/{revision}/{filename}')
    patch.setattr(constants, 'HF_HUB_CACHE', str(cache))
    patch.setattr(constants, 'HF_HUB_DISABLE_PROGRESS_BARS', True)
    patch.delenv('HF_TOKEN', raising=False)


class _Handler(BaseHTTPRequestHandler):
    """Answers the requests that `huggingface_hub` makes for a model."""

    hub: Hub
    protocol_version = 'HTTP/1.1'

    def do_GET(self):
        self._answer()

    def do_HEAD(self):
        self._answer()

    def log_message(self, *_):
        pass

    def _answer(self):
        self.hub.requests.append(f'{self.command} {self.path}')
        parts = [unquote(part) for part in self.path.partition('?')[0].strip('/').split('/')]
        if self.hub.status:
            return self._send(self.hub.status)
        if parts[0] == 'cdn':
            return self._send_file(parts[-1], self._content(*parts[1:]))
        is_info = parts[:2] == ['api', 'models']
        name, rest = '/'.join(parts[2:4] if is_info else parts[:2]), parts[4:] if is_info else parts[2:]
        repository, has_token = self.hub.repositories.get(name), self.headers['Authorization'] == f'Bearer {TOKEN}'
        if repository is None or (repository.private and not has_token):
            return self._send(404 if has_token else 401, {'X-Error-Code': 'RepoNotFound'})
        commit = repository.refs.get(rest[1], rest[1])
        if commit not in repository.commits:
            return self._send(404, {'X-Error-Code': 'RevisionNotFound'})
        files = repository.commits[commit]
        if is_info:
            listed = {'id': name, 'sha': commit, 'siblings': [{'rfilename': file} for file in files]}
            return self._send(200, {'Content-Type': 'application/json'}, json.dumps(listed).encode())
        if repository.gated and not has_token:
            return self._send(403, {'X-Error-Code': 'GatedRepo'})
        file = '/'.join(rest[2:])
        headers = {'X-Repo-Commit': commit}
        if file not in files:
            return self._send(404, headers | {'X-Error-Code': 'EntryNotFound'})
        if file.endswith(_REDIRECTED):
            location = f'{self.hub.endpoint.replace("127.0.0.1", "localhost")}/cdn/{name}/{commit}/{file}'
            return self._send(302, headers | {'Location': location, 'X-Linked-Etag': _etag(files[file]),
                                              'X-Linked-Size': str(len(files[file]))})
        return self._send_file(file, files[file], headers)

    def _content(self, organisation, name, commit, file):
        return self.hub.repositories[f'{organisation}/{name}'].commits[commit][file]

    def _send_file(self, file, content, headers=None):
        headers, status, start = {'ETag': _etag(content), 'Accept-Ranges': 'bytes'} | (headers or {}), 200, 0
        if wanted := self.headers['Range']:
            self.hub.ranges.append(wanted)
            start, status = int(wanted.removeprefix('bytes=').partition('-')[0]), 206
            headers['Content-Range'] = f'bytes {start}-{len(content) - 1}/{len(content)}'
        cut = self.command == 'GET' and self.hub.cuts.get(file, 0) > 0
        if cut:
            self.hub.cuts[file] -= 1
        return self._send(status, headers, content[start:], cut=cut)

    def _send(self, status, headers=None, body=b'', cut=False):
        self.send_response(status)
        for name, value in {'Content-Length': str(len(body))}.items() | (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(body[:len(body) // 2] if cut else body)
        self.close_connection = cut


def _etag(content):
    return f'"{hashlib.sha256(content).hexdigest()}"'
