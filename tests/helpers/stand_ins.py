"""Stand-ins for gcloud, kubectl and Slurm that record their calls, for the tests of launch/."""

import json
import os
import pathlib
import re
import shlex
import shutil
import stat
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / 'launch'
RUN = ['--config=configs/digits.py', '--workdir=gs://bucket/run']
TPU = ['--name=evit', '--zone=us-west4-a']
AWKWARD = ['--note=two  words', "--quote=it's", '--many=$(id) $HOME `id` "x" \\n {a: b} # &', '--empty=', '']

RECORDER = """
import json, os, pathlib, subprocess, sys
here = pathlib.Path(__file__).parent
reads = pathlib.Path(sys.argv[0]).name in ('kubectl', 'sbatch')
call = [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
with open(here / 'calls', 'a') as file:
    print(json.dumps([call, sys.stdin.read() if reads else '']), file=file)
states = here / 'states'
if 'describe' in call and states.exists():
    first, *others = states.read_text().split()
    print(first)
    states.write_text(' '.join(others or [first]))
if 'scp' in call:
    os.link(call[5], here / 'worker' / call[6].split(':')[1])
if 'ssh' in call:
    command = [word[10:] for word in call if word.startswith('--command=')][0]
    sys.exit(subprocess.run(['bash', '-c', command], cwd=here / 'worker').returncode)
"""


def python(text):
    """Returns a script that runs the text with this Python interpreter."""
    return f'#!{sys.executable}\n{text}'


class Cloud:
    """A PATH on which gcloud, kubectl and Slurm record their calls; ssh runs its command in `worker`."""

    def __init__(self, folder):
        self.folder, self.worker = folder, folder / 'worker'
        self.worker.mkdir()
        self.program('gcloud', python(RECORDER))
        for name in ('kubectl', 'sbatch', 'scancel', 'scontrol'):
            shutil.copy(folder / 'gcloud', folder / name)

    def program(self, name, text):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def run(self, script, *args, **env):
        env = {**os.environ, 'PATH': f'{self.folder}:{os.environ["PATH"]}', 'TMPDIR': str(self.folder), **env}
        return subprocess.run([LAUNCH / script, *args], capture_output=True, text=True, env=env, timeout=30,
                              stdin=subprocess.DEVNULL, check=False)

    def calls(self):
        path = self.folder / 'calls'
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self):
        return [next(word for word in call if word in ('create', 'describe', 'delete')) for call, _ in self.calls()]


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, 'the condition did not become true in time'
        time.sleep(0.02)
    return value


def printed(result):
    """Returns the commands that a dry run printed, without their standard input."""
    assert result.returncode == 0, result.stderr
    text = re.sub(r" <<'END'\n.*?\nEND$", '', result.stdout, flags=re.M | re.S)
    return [shlex.split(line) for line in text.splitlines()]
