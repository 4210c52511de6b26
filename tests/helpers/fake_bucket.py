"""A local server for Google Cloud Storage: the part of its JSON API that gcsfs, tensorstore and Google's client use."""

import contextlib
import http.server
import itertools
import json
import re
import sys
import threading
import time
import urllib.parse

PAGE = 7  # entries in a page of a listing; few enough that every client must request further pages


@contextlib.contextmanager
def serving(*buckets, forbidden=()):
    """Yields the server; the variables in its `environment` make the clients use it."""
    server = _Server(('127.0.0.1', 0), _Handler)
    server.objects = {name: {} for name in (*buckets, *forbidden)}  # bucket -> name -> (content, generation)
    server.forbidden, server.uploads, server.lock = set(forbidden), {}, threading.RLock()
    server.generations = itertools.count(1)
    url = f'http://127.0.0.1:{server.server_port}'
    server.environment = {'STORAGE_EMULATOR_HOST': url, 'TENSORSTORE_GCS_HTTP_URL': url,
                          'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false'}  # otherwise gcsfs calls Google's gRPC endpoint
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # gcsfs closes connections early
            super().handle_error(request, client_address)


class _RefusedError(Exception):
    """HTTP code and reason of an error response."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *arguments):
        pass

    def _answer(self):
        url = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(url.query))
        self.content = self._body()
        path = re.sub('^/(?:upload|download)?/?storage/v1/', '', url.path)
        parts = [urllib.parse.unquote(part) for part in path.strip('/').split('/')]
        try:
            with self.server.lock:
                self._route(url.path.startswith('/upload/'), parts)
        except _RefusedError as refusal:
            code, reason = refusal.args
            self._send({'error': {'code': code, 'message': reason}}, code)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _answer

    def _body(self):
        if self.headers.get('Transfer-Encoding') != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length', 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(chunks)

    def _route(self, upload, parts):
        if parts[0] != 'b' or len(parts) < 2:
            raise _RefusedError(404, f'nothing at {self.path}')
        bucket = parts[1]
        if bucket not in self.server.objects:
            raise _RefusedError(404, 'The specified bucket does not exist.')
        if bucket in self.server.forbidden:
            raise _RefusedError(403, f'the account has no access to {bucket}')
        self.bucket, self.objects = bucket, self.server.objects[bucket]
        if len(parts) == 2:
            self._send({'kind': 'storage#bucket', 'name': bucket})
        elif upload:
            self._upload()
        elif len(parts) == 3:
            self._list()
        elif 'rewriteTo' in parts or 'moveTo' in parts:
            self._copy(parts)
        else:
            {'GET': self._get, 'DELETE': self._delete}[self.command](parts[3])

    def _upload(self):
        kind = self.query['uploadType']
        if kind == 'media':
            self._store(self.query['name'], self.content)
        elif kind == 'multipart':
            boundary = b'--' + re.search('boundary="?([^"]+)"?', self.headers['Content-Type'])[1].encode()
            metadata, content = (part.split(b'\n\n', 1)[1] for part in self.content.split(boundary, 3)[1:3])
            self._store(json.loads(metadata)['name'], content[:-1])
        elif 'upload_id' not in self.query:
            number = str(next(self.server.generations))
            self.server.uploads[number] = bytearray()
            name = self.query.get('name') or json.loads(self.content)['name']
            query = urllib.parse.urlencode({'uploadType': kind, 'upload_id': number, 'name': name})
            self._send({}, headers={'Location': f'{self.server.environment["STORAGE_EMULATOR_HOST"]}/upload/storage/v1'
                                                f'/b/{self.bucket}/o?{query}'})
        else:
            content = self.server.uploads[self.query['upload_id']]
            content += self.content
            end = self.headers['Content-Range'].rpartition('/')[2]
            if end == '*' or int(end) > len(content):
                self._send(None, 308, {'Range': f'bytes=0-{len(content) - 1}'})
            else:
                self._store(self.query['name'], bytes(content))

    def _store(self, name, content):
        self._check_generation(name)
        self.objects[name] = (content, next(self.server.generations))
        self._send(self._metadata(name))

    def _check_generation(self, name):
        if (generation := self.query.get('ifGenerationMatch')) is not None and \
                int(generation) != self.objects.get(name, (b'', 0))[1]:
            raise _RefusedError(412, 'conditionNotMet')

    def _list(self):
        prefix, delimiter = self.query.get('prefix', ''), self.query.get('delimiter')
        entries = {}
        for name in sorted(self.objects):
            if name.startswith(prefix):
                rest = name[len(prefix):]
                folder = delimiter and delimiter in rest
                entries[prefix + rest.split(delimiter)[0] + delimiter if folder else name] = bool(folder)
        names = [name for name in entries if name > self.query.get('pageToken', '')]
        page = names[:min(PAGE, int(self.query.get('maxResults', PAGE)))]
        more = {'nextPageToken': page[-1]} if len(names) > len(page) else {}
        self._send({'kind': 'storage#objects', 'items': [self._metadata(name) for name in page if not entries[name]],
                    'prefixes': [name for name in page if entries[name]]} | more)

    def _copy(self, parts):
        source, target = parts[3], parts[-1]
        if source not in self.objects:
            raise _RefusedError(404, f'No such object: {source}')
        self.objects[target] = (self.objects[source][0], next(self.server.generations))
        if 'moveTo' in parts:
            del self.objects[source]
            self._send(self._metadata(target))
        else:
            self._send({'done': True, 'resource': self._metadata(target)})

    def _get(self, name):
        if name not in self.objects:
            raise _RefusedError(404, f'No such object: {name}')
        if self.query.get('alt') != 'media':
            return self._send(self._metadata(name))
        content, generation = self.objects[name]
        code, headers = 200, {'x-goog-generation': str(generation)}
        if requested := self.headers.get('Range'):
            begin, end = re.fullmatch(r'bytes=(\d*)-(\d*)', requested).groups()
            begin, end = (int(begin), int(end or len(content))) if begin else (len(content) - int(end), len(content))
            if begin >= len(content):
                raise _RefusedError(416, 'InvalidRange')
            end = min(end, len(content) - 1)
            code, headers = 206, headers | {'Content-Range': f'bytes {begin}-{end}/{len(content)}'}
            content = content[begin:end + 1]
        return self._send(content, code, headers)

    def _delete(self, name):
        self._check_generation(name)
        if self.objects.pop(name, None) is None:
            raise _RefusedError(404, f'No such object: {name}')
        self._send(None, 204)

    def _metadata(self, name):
        content, generation = self.objects[name]
        return {'kind': 'storage#object', 'name': name, 'bucket': self.bucket, 'size': str(len(content)),
                'generation': str(generation), 'metageneration': '1', 'contentType': 'application/octet-stream',
                'updated': time.strftime('%Y-%m-%dT%H:%M:%S.000Z', time.gmtime())}

    def _send(self, content, code=200, headers=()):
        data = content if isinstance(content, bytes) else b'' if content is None else json.dumps(content).encode()
        self.send_response(code)
        for key, value in {'Content-Type': 'application/json', **dict(headers)}.items():
            self.send_header(key, value)
        if code != 204:
            self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)
