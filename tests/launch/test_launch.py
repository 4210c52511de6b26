"""The launch scripts: help, errors, dry runs, and the manifest for Kubernetes."""

import re
import shlex
import shutil
import subprocess

import pytest
import yaml

from tests.helpers.stand_ins import AWKWARD, LAUNCH, ROOT, RUN, TPU, Cloud, printed

LAUNCHERS = ['tpu_vm.sh', 'gke_jobset.sh', 'slurm.sh', 'local.sh']
SCRIPTS = sorted(path.name for path in LAUNCH.glob('*.sh'))
GKE = ['render', '--name=evit', '--image=place/image:1', *RUN]
V5E = ['--type=v5e', '--topology=4x4']


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def words_of(line):
    """Splits a command line. A name in capitals is replaced by several arguments."""
    abbreviations = {'TPU': TPU, 'RUN': RUN, 'GKE': GKE, 'V5E': V5E}
    return [word for words in shlex.split(line) for word in abbreviations.get(words, [words])]


@pytest.mark.parametrize('script', SCRIPTS)
def test_script_has_valid_shell_syntax(script):
    subprocess.run(['bash', '-n', LAUNCH / script], check=True)
    if shutil.which('shellcheck'):
        subprocess.run(['shellcheck', '-x', '-P', ROOT, LAUNCH / script], check=True)


@pytest.mark.parametrize('script', LAUNCHERS)
def test_help_lists_every_option_and_gives_examples(script, cloud):
    result = cloud.run(script, '--help')
    options = re.search(r"read_options '([^']+)'", (LAUNCH / script).read_text())[1].split()
    assert result.returncode == 0 and len(options) > 5
    assert 'Usage: launch/' in result.stdout and 'Examples:' in result.stdout
    for name in [*options, 'dry-run']:
        assert re.search(rf'^  --{name.rstrip(":+")} ', result.stdout, re.M), name


DRY = [('tpu_vm.sh', ['create', *TPU, '--type=v6e-16', '--spot']), ('tpu_vm.sh', ['setup', *TPU]),
       ('tpu_vm.sh', ['start', *TPU, *RUN]), ('tpu_vm.sh', ['stop', *TPU]), ('tpu_vm.sh', ['logs', *TPU]),
       ('tpu_vm.sh', ['status', *TPU]), ('tpu_vm.sh', ['delete', *TPU]),
       ('gke_jobset.sh', ['apply', *GKE[1:], *V5E]), ('gke_jobset.sh', ['logs', '--name=evit', '--worker=all']),
       ('gke_jobset.sh', ['status', '--name=evit']), ('gke_jobset.sh', ['delete', '--name=evit']),
       ('slurm.sh', ['submit', *RUN]), ('slurm.sh', ['logs']), ('slurm.sh', ['cancel']), ('local.sh', RUN)]


@pytest.mark.parametrize('script, args', DRY, ids=lambda value: value if isinstance(value, str) else value[0])
def test_dry_run_prints_commands_and_runs_none(script, args, cloud):
    before = sorted(cloud.folder.rglob('*'))
    commands = printed(cloud.run(script, *args, '--dry-run'))
    assert commands and all(shutil.which(words[0]) or words[0] in ('gcloud', 'kubectl', 'sbatch', 'scancel')
                            for words in commands)
    assert cloud.calls() == [] and sorted(cloud.folder.rglob('*')) == before


@pytest.mark.parametrize('line', [
    'tpu_vm.sh start TPU', 'gke_jobset.sh render --name=evit --image=a V5E', 'slurm.sh submit', 'local.sh'])
def test_config_that_names_a_recipe_is_replaced_by_its_file(line, cloud):
    script, *args = words_of(line)
    result = cloud.run(script, *args, '--config=digits', '--workdir=gs://bucket/run', '--dry-run')
    assert result.returncode == 0 and '--config=configs/digits.py' in result.stdout, result.stderr


WRONG = [
    ('tpu_vm.sh', 'give one of: create setup'),
    ('tpu_vm.sh create setup', 'create setup'),
    ('tpu_vm.sh make', 'make is not one of'),
    ('tpu_vm.sh create --name=evit', '--zone is missing'),
    ('tpu_vm.sh create --zone=us-west4-a', '--name is missing'),
    ('tpu_vm.sh create --name=E --zone=us-west4-a', '--name=E is not a name of lower case letters'),
    ('tpu_vm.sh create --name=evit --zone=west', '--zone=west is not a zone'),
    ('tpu_vm.sh create TPU', '--type is missing'),
    ('tpu_vm.sh create TPU --type=v6e-12', '--type=v6e-12: v6e has 1, 4, 8, 16'),
    ('tpu_vm.sh create TPU --type=v5p-12', 'a multiple of 8'),
    ('tpu_vm.sh create TPU --type=v5p-99992', 'at most 12288'),
    ('tpu_vm.sh create TPU --type=v9-8', '--type=v9-8 is not one of v4-N'),
    ('tpu_vm.sh create TPU --type=v6e-8 --poll=x', '--poll=x is not a whole number from 0 to 3600'),
    ('tpu_vm.sh setup TPU --commit=nowhere', '--commit=nowhere is no commit'),
    ('tpu_vm.sh start TPU --config=configs/digits.py --workdir=runs/a', '--workdir=runs/a is not gs://'),
    ('tpu_vm.sh start TPU --config=configs/none.py --workdir=gs://a', 'configs/none.py: there is no such file'),
    ('tpu_vm.sh logs TPU --worker=two', '--worker=two is not a number or all'),
    ('tpu_vm.sh stop TPU --spot=1', '--spot takes no value: leave out =1'),
    ('tpu_vm.sh delete TPU', 'give --yes'),
    ('tpu_worker.sh fly', 'fly is not one of'),
    ('gke_jobset.sh render --name=-a', '--name=-a is not a name'),
    ('gke_jobset.sh GKE --type', '--type needs a value: write --type=VALUE'),
    ('gke_jobset.sh GKE --type --spot', '--type needs a value: write --type=VALUE'),
    ('gke_jobset.sh GKE --type=v5e', '--topology is missing'),
    ('gke_jobset.sh GKE --type=v7 --topology=2x2', '--type=v7 is not one of v4, v5e'),
    ('gke_jobset.sh GKE --type=v5e --topology=4x4x4', '--topology=4x4x4: v5e has 1x1 2x2 2x4'),
    ('gke_jobset.sh GKE --type=v6e --topology=32x32', '--topology=32x32: v6e has 1x1 2x2 2x4'),
    ('gke_jobset.sh GKE --type=v5p --topology=4x4', '--topology=4x4: v5p has 2x2x1'),
    ('gke_jobset.sh GKE --type=v5p --topology=4x4x6', 'multiples of 4'),
    ('gke_jobset.sh GKE --type=v5p --topology=8x4x4', 'none smaller than the one before'),
    ('gke_jobset.sh GKE --type=v5p --topology=16x16x28', 'at most 6144 chips'),
    ('gke_jobset.sh GKE V5E --chips-per-host=8', 'v5e in 4x4 has hosts of 4 chips'),
    ('gke_jobset.sh GKE V5E --workdir=/tmp/run', 'the disk of a pod ends with it'),
    ('gke_jobset.sh GKE V5E --config=/dev/null', '--config=/dev/null: there is no such file'),
    ('gke_jobset.sh GKE V5E --env=novalue', '--env=novalue is not KEY=VALUE'),
    ('gke_jobset.sh GKE V5E --restarts=-1', '--restarts=-1 is not a whole number'),
    ('gke_jobset.sh GKE V5E -- "two\nlines"', 'a line break'),
    ('gke_jobset.sh delete --name=a', 'give --yes'),
    ('slurm.sh submit RUN --nodes=0', '--nodes=0 is not a whole number from 1 to 4096'),
    ('slurm.sh submit RUN --time=soon', '--time=soon is not a time'),
    ('slurm.sh submit --config=configs/digits.py', '--workdir is missing'),
    ('slurm.sh submit RUN --python=/nowhere', '--python=/nowhere is not a program'),
    ('slurm.sh logs --logs=%j', 'without %'),
    ('slurm.sh cancel', 'give --yes'),
    ('local.sh', '--config is missing'),
    ('local.sh RUN word', 'unexpected argument word: options begin with --'),
    ('local.sh RUN --processes=0', '--processes=0 is not a whole number from 1 to 64'),
    ('local.sh RUN --devices=two', '--devices=two is not a whole number'),
    ('local.sh RUN --config.seed=1', 'flags of evit_jax.main follow after --'),
    ('local.sh RUN --program=true', '--program takes its arguments after --'),
    ('local.sh --program=/nowhere', '/nowhere is not a program')]


@pytest.mark.parametrize('line, message', WRONG, ids=[line for line, _ in WRONG])
def test_script_with_wrong_arguments_refuses_before_it_runs_anything(line, message, cloud):
    script, *args = words_of(line)
    result = cloud.run(script, *args)
    assert result.returncode == 2 and result.stdout == ''
    assert message in result.stderr and result.stderr.startswith(f'{script}: ') and result.stderr.count('\n') == 1
    assert cloud.calls() == []


@pytest.mark.parametrize('line', ['tpu_vm.sh stop TPU', 'gke_jobset.sh status --name=evit', 'slurm.sh cancel --yes'])
def test_script_without_the_program_it_calls_names_it_and_a_dry_run_needs_none(line, cloud):
    cloud.folder = cloud.folder / 'bin'
    cloud.folder.mkdir()
    for name in ('bash', 'env', 'dirname'):
        (cloud.folder / name).symlink_to(shutil.which(name))
    script, *args = words_of(line)
    result = cloud.run(script, *args, PATH=str(cloud.folder))
    assert result.returncode == 2 and re.search('(gcloud|kubectl|sbatch) is not on the PATH: ', result.stderr)
    assert printed(cloud.run(script, *args, '--dry-run', PATH=str(cloud.folder)))


def render(cloud, *args):
    result = cloud.run('gke_jobset.sh', *GKE, *args)
    assert result.returncode == 0, result.stderr
    manifest = yaml.safe_load(result.stdout)
    job = manifest['spec']['replicatedJobs'][0]['template']['spec']
    return manifest, job, job['template']['spec']


def test_manifest_has_one_indexed_job_that_restarts_as_a_whole(cloud):
    manifest, job, pod = render(cloud, *V5E, '--restarts=7', '--grace=90')
    assert (manifest['apiVersion'], manifest['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
    assert manifest['metadata']['name'] == 'evit'
    policy = manifest['spec']['failurePolicy']
    assert policy['maxRestarts'] == 7
    assert policy['rules'][0]['action'] == 'RestartJobSetAndIgnoreMaxRestarts'
    assert policy['rules'][0]['onJobFailureReasons'] == ['PodFailurePolicy']
    assert [(entry['replicas'], entry['name']) for entry in manifest['spec']['replicatedJobs']] == [(1, 'slice')]
    assert job['completionMode'] == 'Indexed' and job['backoffLimit'] == 0
    disrupted, saved = job['podFailurePolicy']['rules']
    assert disrupted['onPodConditions'] == [{'type': 'DisruptionTarget', 'status': 'True'}]
    assert saved['onExitCodes'] == {'containerName': 'train', 'operator': 'In', 'values': [75]}
    assert pod['restartPolicy'] == 'Never' and pod['terminationGracePeriodSeconds'] == 90
    assert [c['name'] for c in pod['containers']] == ['train'] and pod['containers'][0]['image'] == 'place/image:1'
    mounts = {mount['name'] for mount in pod['containers'][0]['volumeMounts']}
    assert mounts == {volume['name'] for volume in pod['volumes']}


@pytest.mark.parametrize('kind, topology, per_host, hosts, accelerator', [
    ('v5e', '1x1', 1, 1, 'tpu-v5-lite-podslice'), ('v5e', '2x2', 4, 1, 'tpu-v5-lite-podslice'),
    ('v5e', '2x4', 8, 1, 'tpu-v5-lite-podslice'), ('v5e', '16x16', 4, 64, 'tpu-v5-lite-podslice'),
    ('v6e', '2x4', 8, 1, 'tpu-v6e-slice'), ('v6e', '4x4', 4, 4, 'tpu-v6e-slice'),
    ('v6e', '8x16', 4, 32, 'tpu-v6e-slice'), ('v5p', '2x2x1', 4, 1, 'tpu-v5p-slice'),
    ('v5p', '2x2x2', 4, 2, 'tpu-v5p-slice'), ('v5p', '16x16x24', 4, 1536, 'tpu-v5p-slice'),
    ('v4', '4x4x8', 4, 32, 'tpu-v4-podslice')])
def test_manifest_has_a_pod_for_each_host_and_all_its_chips(kind, topology, per_host, hosts, accelerator, cloud):
    _, job, pod = render(cloud, f'--type={kind}', f'--topology={topology}')
    assert job['completions'] == job['parallelism'] == hosts
    chips = {'google.com/tpu': per_host}
    assert pod['containers'][0]['resources'] == {'requests': chips, 'limits': chips}
    assert pod['nodeSelector'] == {'cloud.google.com/gke-tpu-accelerator': accelerator,
                                   'cloud.google.com/gke-tpu-topology': topology}


def test_manifest_with_chips_per_host_takes_smaller_hosts(cloud):
    _, job, pod = render(cloud, '--type=v6e', '--topology=2x4', '--chips-per-host=4')
    assert job['completions'] == 2 and pod['containers'][0]['resources']['limits'] == {'google.com/tpu': 4}


def test_manifest_has_spot_nodes_and_service_account_only_with_their_options(cloud):
    _, _, plain = render(cloud, *V5E)
    _, _, pod = render(cloud, *V5E, '--spot', '--service-account=trainer')
    assert pod['nodeSelector'].pop('cloud.google.com/gke-spot') == 'true'
    assert pod.pop('tolerations')[0]['key'] == 'cloud.google.com/gke-spot'
    assert pod.pop('serviceAccountName') == 'trainer'
    assert pod == plain


def test_manifest_passes_flags_and_environment_unchanged(cloud):
    _, _, pod = render(cloud, *V5E, '--env=A=', '--env=ON=$(A) "b" \\', '--', *AWKWARD)
    container, = pod['containers']
    assert container['command'] == ['python', '-m', 'evit_jax.main']
    # Kubernetes replaces $$( by $(, and expands $(A).
    assert [arg.replace('$$(', '$(') for arg in container['args']] == [*RUN, *AWKWARD]
    assert '$$(id)' in container['args'][4]
    assert container['env'] == [{'name': 'A', 'value': ''}, {'name': 'ON', 'value': '$$(A) "b" \\'}]


def test_apply_passes_the_rendered_manifest_to_kubectl(cloud):
    assert cloud.run('gke_jobset.sh', 'apply', *GKE[1:], *V5E, '--namespace=mine').returncode == 0
    (call, manifest), = cloud.calls()
    assert call == ['kubectl', '--namespace=mine', 'apply', '-f', '-']
    assert yaml.safe_load(manifest) == render(cloud, *V5E)[0]
