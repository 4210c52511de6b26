"""Runs of the launch scripts: Cloud TPU and Slurm with stand-ins, local.sh with real processes."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

from tests.helpers.stand_ins import AWKWARD, LAUNCH, ROOT, RUN, TPU, Cloud, python, until

PIN = re.search(r'^jax==(.+)$', (ROOT / 'requirements.txt').read_text(), re.M)[1]


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


@pytest.mark.parametrize('states, verbs, code', [
    ('WAITING_FOR_RESOURCES PROVISIONING ACTIVE', 'describe describe describe', 0),
    ('SUSPENDED WAITING_FOR_RESOURCES ACTIVE', 'describe delete create describe describe', 0),
    ('PROVISIONING FAILED', 'describe describe', 1)])
def test_create_waits_for_active_and_replaces_a_preempted_tpu(states, verbs, code, cloud):
    (cloud.folder / 'states').write_text(states)
    result = cloud.run('tpu_vm.sh', 'create', *TPU, '--type=v6e-8', '--poll=0')
    assert result.returncode == code and cloud.verbs() == verbs.split()
    assert states.split()[-1] in result.stdout
    assert ('will not become ACTIVE' in result.stderr) == bool(code)


def test_create_without_a_request_creates_one_and_without_a_state_fails(cloud):
    args = ['--project=p', '--type=v5litepod-16', '--spot', '--poll=0']
    result = cloud.run('tpu_vm.sh', 'create', *TPU, *args)
    assert result.returncode == 1 and 'gcloud does not report the state of evit' in result.stderr
    assert cloud.verbs()[:3] == ['describe', 'create', 'describe']
    create, _ = cloud.calls()[1]
    assert create[:6] == ['gcloud', 'compute', 'tpus', 'queued-resources', 'create', 'evit']
    assert set(create[6:]) == {'--zone=us-west4-a', '--project=p', '--node-id=evit', '--accelerator-type=v5litepod-16',
                               '--runtime-version=v2-alpha-tpuv5-lite', '--spot', '--async'}


WORKER_PYTHON = """
import json, os, pathlib, signal, sys, time
if '-c' in sys.argv: sys.exit()
with open('started', 'a') as file: print(json.dumps(sys.argv[1:]), file=file)
count = len(pathlib.Path('started').read_text().splitlines())
if '--wait=' not in sys.argv: sys.exit(75 if count == 1 else 3)
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), os._exit(75)))
time.sleep(30)
"""
# Replaces `python3 -m pip` of the worker, which installs uv; uv creates .venv.
INSTALLS_UV = """#!/bin/bash
mkdir -p .uv/bin && cat >.uv/bin/uv <<'END'
#!/bin/bash
printf '%s\\n' "$*" >>uv_calls
mkdir -p .venv/bin && cp ../../worker_python .venv/bin/python
END
chmod +x .uv/bin/uv
"""


@pytest.fixture
def worker(cloud):
    """A worker that was set up from a commit of this repository's launch/ and configs/."""
    cloud.program('worker_python', python(WORKER_PYTHON))
    cloud.program('python3', INSTALLS_UV)
    repository = cloud.folder / 'repository'
    for part in ('launch', 'configs'):
        shutil.copytree(ROOT / part, repository / part)
    shutil.copy(ROOT / 'requirements.txt', repository)
    for words in (['init', '-q'], ['add', '.'], ['-c', 'user.name=a', '-c', 'user.email=b', 'commit', '-qm', 'c']):
        subprocess.run(['git', *words], cwd=repository, check=True)
    result = cloud.run(repository / 'launch' / 'tpu_vm.sh', 'setup', *TPU)
    assert result.returncode == 0, result.stderr
    return cloud.worker / 'evit_jax'


def test_setup_copies_the_commit_and_installs_the_pinned_jax(worker, cloud):
    assert (worker / 'launch' / 'tpu_worker.sh').read_bytes() == (LAUNCH / 'tpu_worker.sh').read_bytes()
    assert [call[3:5] for call, _ in cloud.calls()] == [['tpu-vm', 'scp'], ['tpu-vm', 'ssh']]
    assert all('--worker=all' in call for call, _ in cloud.calls())
    assert (worker / 'uv_calls').read_text().splitlines()[-1].endswith(f'-r requirements.txt jax[tpu]=={PIN} gcsfs')
    assert list(cloud.folder.glob('*.tar.gz')) == []


@pytest.mark.skipif(not pathlib.Path('/proc/self/cmdline').exists(), reason='workers are Linux')
def test_worker_restarts_on_75_only_and_stops_on_request(worker, cloud):
    started = lambda: (worker / 'started').read_text().splitlines() if (worker / 'started').exists() else []
    log = lambda: (worker / 'train.log').read_text()
    assert cloud.run('tpu_vm.sh', 'start', *TPU, *RUN, '--', *AWKWARD).returncode == 0
    until(lambda: 'exit code 3' in log())
    assert [json.loads(line) for line in started()] == 2 * [['-m', 'evit_jax.main', *RUN, *AWKWARD]]
    assert cloud.run('tpu_vm.sh', 'start', *TPU, *RUN, '--', '--wait=').returncode == 0
    until(lambda: len(started()) == 3)
    (cloud.folder / 'states').write_text('ACTIVE')
    assert 'evit_jax.main runs, as process' in cloud.run('tpu_vm.sh', 'status', *TPU).stdout
    again = cloud.run('tpu_vm.sh', 'start', *TPU, *RUN)
    assert again.returncode == 1 and 'evit_jax.main runs already' in again.stderr
    assert 'asked to save and end' in cloud.run('tpu_vm.sh', 'stop', *TPU).stdout
    until(lambda: log().count('exit code 75') == 2)
    until(lambda: 'evit_jax.main does not run' in cloud.run('tpu_vm.sh', 'stop', *TPU).stdout)
    assert len(started()) == 3


def submit(cloud, *args):
    result = cloud.run('slurm.sh', 'submit', *RUN, '--nodes=2', '--gpus-per-node=4', f'--logs={cloud.folder}',
                       f'--python={sys.executable}', *args)
    assert result.returncode == 0, result.stderr
    (call, script), = cloud.calls()
    (cloud.folder / 'calls').unlink()
    return call, script


def test_slurm_job_has_one_task_per_gpu_and_is_requeued_with_time_to_save(cloud):
    call, script = submit(cloud, '--sbatch=--constraint=a b', '--', *AWKWARD)
    assert {'--nodes=2', '--ntasks-per-node=4', '--gpus-per-node=4', '--requeue', '--signal=B:TERM@120',
            '--open-mode=append', '--constraint=a b', f'--output={cloud.folder}/evit.log'} <= set(call)
    step = re.search(r'^srun .*?(?= &$)', script, re.M | re.S)[0]
    words = shlex.split(step)
    assert words[words.index('-m'):] == ['-m', 'evit_jax.main', *RUN, *AWKWARD]
    assert not [word for word in [*call, *words] if 'gpus-per-task' in word]


@pytest.mark.parametrize('code, requeued', [(0, []), (1, []), (75, [['scontrol', 'requeue', '17']])])
def test_slurm_job_is_requeued_on_75_only(code, requeued, cloud):
    _, script = submit(cloud)
    cloud.program('srun', f'#!/bin/bash\nexit {code}\n')
    assert cloud.run(cloud.program('batch', script), SLURM_JOB_ID='17').returncode == code
    assert [call for call, _ in cloud.calls()] == requeued


def test_slurm_job_forwards_sigterm_to_its_tasks_and_waits_for_them(cloud):
    _, script = submit(cloud)
    cloud.program('srun', f"#!/bin/bash\ntrap 'sleep 0.3; exit 75' USR1\necho $$ >{cloud.folder}/step\n"
                          'for i in {1..300}; do sleep 0.1; done\n')
    cloud.program('scancel', f'#!/bin/bash\necho "$@" >{cloud.folder}/cancelled\n'
                             f'kill -s USR1 "$(cat {cloud.folder}/step)"\n')
    env = {**os.environ, 'PATH': f'{cloud.folder}:{os.environ["PATH"]}', 'SLURM_JOB_ID': '17'}
    batch = subprocess.Popen([cloud.program('batch', script)], env=env, stdout=subprocess.DEVNULL)
    until(lambda: (cloud.folder / 'step').exists() and (cloud.folder / 'step').read_text())
    batch.send_signal(signal.SIGTERM)
    assert batch.wait(timeout=10) == 75
    assert (cloud.folder / 'cancelled').read_text().split() == ['--signal=TERM', '17']
    assert [call for call, _ in cloud.calls()] == [['scontrol', 'requeue', '17']]


PROGRAM = """
import json, os, pathlib, signal, subprocess, sys, time
number, here = os.environ['PROCESS_ID'], pathlib.Path(sys.argv[1])
def save(number, _):
    print('saved on', signal.Signals(number).name)
    sys.exit(75)
if 'save' in sys.argv: [signal.signal(number, save) for number in (signal.SIGTERM, signal.SIGINT)]
if 'deaf' in sys.argv: signal.signal(signal.SIGTERM, signal.SIG_IGN)
if 'child' in sys.argv: subprocess.Popen(['sleep', '60'])
print('argument', *sys.argv[2:], flush=True)
print('without an end', end='', file=sys.stderr, flush=True)
(here / number).write_text(json.dumps([os.getpid(), dict(os.environ)]))
if f'exit{number}' in sys.argv:
    while len(list(here.iterdir())) < int(os.environ['NUM_PROCESSES']): time.sleep(0.02)
    sys.exit(7)
if 'stay' in sys.argv: time.sleep(60)
"""
# Runs a command with SIGINT handled as in a terminal; tests in the background ignore it.
WITH_SIGINT = ('import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); '
               'os.execv(sys.argv[1], sys.argv[1:])')


class Local:
    """local.sh with `PROGRAM`, whose arguments choose its behaviour."""

    def __init__(self, folder, *words, options=()):
        program = Cloud(folder).program('program', python(PROGRAM))
        self.folder = folder / 'processes'
        self.folder.mkdir()
        self.shell = subprocess.Popen(
            [sys.executable, '-c', WITH_SIGINT, LAUNCH / 'local.sh',
             f'--program={program}', *options, '--', self.folder, *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, 'XLA_FLAGS': '--xla_a=1'})

    def process(self, number):
        """Returns id and environment of a process, after waiting for its start."""
        path = self.folder / str(number)
        return json.loads(until(lambda: path.exists() and path.read_text()))

    def end(self):
        output, errors = self.shell.communicate(timeout=20)
        return self.shell.returncode, output, errors


def test_local_starts_processes_with_one_coordinator_and_separate_devices(tmp_path):
    local = Local(tmp_path, 'two  words', options=['--processes=3', '--devices=2'])
    code, output, errors = local.end()
    environments = [local.process(number)[1] for number in range(3)]
    assert (code, errors) == (0, '')
    assert [env['PROCESS_ID'] for env in environments] == ['0', '1', '2']
    assert len({env['COORDINATOR_ADDRESS'] for env in environments}) == 1
    assert re.fullmatch(r'127\.0\.0\.1:2\d{4}', environments[0]['COORDINATOR_ADDRESS'])
    assert {env['NUM_PROCESSES'] for env in environments} == {'3'}
    assert {env['XLA_FLAGS'] for env in environments} == {'--xla_a=1 --xla_force_host_platform_device_count=2'}
    assert {env['JAX_CPU_COLLECTIVES_IMPLEMENTATION'] for env in environments} == {'gloo'}
    lines = sorted(output.splitlines())
    assert lines == [f'[{n}] {text}' for n in range(3) for text in ('argument two  words', 'without an end')]


@pytest.mark.parametrize('number', [0, 1])
def test_local_with_a_failed_process_ends_the_others_and_returns_its_exit_code(number, tmp_path):
    code, output, errors = Local(tmp_path, f'exit{number}', 'stay', 'save').end()
    assert code == 7 and f'process {number} ended with exit code 7' in errors
    assert 'saved on SIGTERM' in output


def test_local_with_a_killed_process_ends_the_others_and_leaves_no_children(tmp_path):
    local = Local(tmp_path, 'stay', 'child')
    (first, _), (second, _) = local.process(0), local.process(1)
    os.kill(second, signal.SIGKILL)
    assert local.end()[0] == 128 + signal.SIGKILL
    for group in (first, second):
        until(lambda group=group: not exists(group))


def exists(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize('sent', [signal.SIGTERM, signal.SIGINT])
def test_local_forwards_signals_and_waits_until_the_processes_have_saved(sent, tmp_path):
    local = Local(tmp_path, 'stay', 'save')
    for number in range(2):
        local.process(number)
    local.shell.send_signal(sent)
    code, output, _ = local.end()
    assert code == 75 and output.count(f'saved on {sent.name}') == 2


def test_local_kills_processes_that_do_not_end_in_time(tmp_path):
    local = Local(tmp_path, 'stay', 'deaf', options=['--grace=0'])
    for number in range(2):
        local.process(number)
    local.shell.send_signal(signal.SIGTERM)
    code, _, errors = local.end()
    assert code == 128 + signal.SIGKILL and 'not ended in --grace=0 seconds, killed: ' in errors
