"""The manifest and the command lines of launch/ against the published forms of Kubernetes, JobSet and gcloud."""

import re

import pytest
import yaml

from tests.helpers.stand_ins import RUN, TPU, Cloud, printed

# Fields of the published API that the template uses, with type or allowed values. A list has the form of its items.
# Sources: kubernetes.io/docs/reference/kubernetes-api (Job v1, Pod v1); jobset.sigs.k8s.io/docs/reference (v1alpha2)
STRINGS = {str: str}  # a mapping of strings
CONTAINER = {
    'name': str, 'image': str, 'command': [str], 'args': [str], 'env': [{'name': str, 'value': str}],
    'ports': [{'containerPort': int}], 'resources': {'requests': {str: int}, 'limits': {str: int}},
    'volumeMounts': [{'name': str, 'mountPath': str}]}
POD = {
    'restartPolicy': {'Never', 'OnFailure'}, 'terminationGracePeriodSeconds': int, 'nodeSelector': STRINGS,
    'tolerations': [{'key': str, 'operator': {'Equal', 'Exists'}, 'value': str,
                     'effect': {'NoSchedule', 'PreferNoSchedule', 'NoExecute'}}],
    'serviceAccountName': str, 'containers': [CONTAINER],
    'volumes': [{'name': str, 'emptyDir': {'medium': {'', 'Memory'}}}]}
FAILURE_RULE = {
    'action': {'FailJob', 'FailIndex', 'Ignore', 'Count'},
    'onPodConditions': [{'type': str, 'status': {'True', 'False', 'Unknown'}}],
    'onExitCodes': {'containerName': str, 'operator': {'In', 'NotIn'}, 'values': [int]}}
JOB = {
    'completionMode': {'Indexed', 'NonIndexed'}, 'completions': int, 'parallelism': int, 'backoffLimit': int,
    'podFailurePolicy': {'rules': [FAILURE_RULE]}, 'template': {'spec': POD}}
ACTIONS = {'FailJobSet', 'RestartJobSet', 'RestartJobSetAndIgnoreMaxRestarts'}
JOB_FAILURES = {'BackoffLimitExceeded', 'DeadlineExceeded', 'FailedIndexes', 'MaxFailedIndexesExceeded',
                'PodFailurePolicy'}
JOBSET = {
    'apiVersion': {'jobset.x-k8s.io/v1alpha2'}, 'kind': {'JobSet'},
    'metadata': {'name': str, 'annotations': STRINGS},
    'spec': {
        'failurePolicy': {'maxRestarts': int, 'rules': [
            {'name': str, 'action': ACTIONS, 'onJobFailureReasons': [JOB_FAILURES]}]},
        'replicatedJobs': [{'name': str, 'replicas': int, 'template': {'spec': JOB}}]}}

# Flags of the commands that tpu_vm.sh calls, with a pattern for the value; None: the flag takes no value.
# Source: cloud.google.com/sdk/gcloud/reference/compute/tpus; compared with `--help` of gcloud 528.0.0.
LOCATION = {'--zone': r'[a-z]+-[a-z]+\d-[a-z]', '--project': r'[a-z][-a-z0-9]{4,28}[a-z0-9]'}
WORKER = {'--worker': r'all|\d+'}
GCLOUD = {
    'queued-resources create': LOCATION | {
        '--node-id': r'[a-z][-a-z0-9]*', '--accelerator-type': r'(v4|v5litepod|v5p|v6e)-\d+',
        '--runtime-version': r'tpu-ubuntu2204-base|v2-alpha-tpuv(5|5-lite|6e)', '--spot': None, '--async': None},
    'queued-resources describe': LOCATION | {'--format': r'(value|yaml)\([a-z.]+\)'},
    'queued-resources delete': LOCATION | {'--force': None, '--quiet': None},
    'tpu-vm ssh': LOCATION | WORKER | {'--command': r'(?s).+'},
    'tpu-vm scp': LOCATION | WORKER}
REQUIRED = {'queued-resources create': {'--zone', '--node-id', '--accelerator-type', '--runtime-version'},
            'tpu-vm ssh': {'--zone', '--worker', '--command'}, 'tpu-vm scp': {'--zone', '--worker'}}
PROJECT = [*TPU, '--project=my-project']
TPU_LINES = [
    ['create', *PROJECT, '--type=v4-8'], ['create', *PROJECT, '--type=v5p-128'],
    ['create', *TPU, '--type=v5litepod-256', '--spot'], ['create', *TPU, '--type=v6e-16', '--spot'],
    ['setup', *PROJECT], ['start', *PROJECT, *RUN], ['stop', *TPU], ['logs', *TPU, '--worker=all'],
    ['status', *PROJECT], ['delete', *PROJECT]]


def errors_of(value, form, path='manifest'):
    """Returns the differences of a value from a form, each with the path of the field."""
    if isinstance(form, set):
        return [] if value in form else [f'{path}: {value!r} is not one of {sorted(form)}']
    if isinstance(form, type):
        return [] if type(value) is form else [f'{path}: {value!r} is not of type {form.__name__}']
    if type(value) is not type(form):
        return [f'{path}: {value!r} is not a {type(form).__name__}']
    if isinstance(form, list):
        return [error for index, item in enumerate(value) for error in errors_of(item, form[0], f'{path}[{index}]')]
    errors = []
    for key, item in value.items():
        if key not in form and str not in form:
            errors.append(f'{path}: no field {key}')
        else:
            errors += errors_of(item, form.get(key, form.get(str)), f'{path}.{key}')
    return errors


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


@pytest.fixture(params=[[], ['--spot', '--service-account=trainer', '--env=A=1']], ids=['plain', 'all options'])
def manifest(request, cloud):
    result = cloud.run('gke_jobset.sh', 'render', '--name=evit', '--image=registry/image:1', '--type=v5p',
                       '--topology=4x4x4', *RUN, *request.param)
    assert result.returncode == 0, result.stderr
    return yaml.safe_load(result.stdout)


def test_manifest_has_only_published_fields_and_values(manifest):
    assert errors_of(manifest, JOBSET) == []


def test_job_of_the_manifest_fits_the_json_schema_of_kubernetes(manifest):
    schemas = pytest.importorskip('kubernetes_validate', reason='pip install kubernetes-validate: it ships the schemas')
    spec = manifest['spec']['replicatedJobs'][0]['template']['spec']
    job = {'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': {'name': 'evit'}, 'spec': spec}
    schemas.validate(job, schemas.latest_version(), strict=True)


@pytest.mark.parametrize('field, value', [('kind', 'Job'), ('extra', 1), ('metadata', 'evit')])
def test_errors_of_manifest_with_a_wrong_field_names_it(field, value, manifest):
    error, = errors_of(manifest | {field: value}, JOBSET)
    assert field in error


@pytest.mark.parametrize('args', TPU_LINES, ids=lambda args: ' '.join(word for word in args if word not in PROJECT))
def test_tpu_command_lines_have_only_documented_flags_and_values(args, cloud):
    lines = [words for words in printed(cloud.run('tpu_vm.sh', *args, '--dry-run')) if words[0] == 'gcloud']
    assert lines
    for line in lines:
        assert line[:3] == ['gcloud', 'compute', 'tpus']
        command, words = ' '.join(line[3:5]), line[5:]
        flags = dict(word.partition('=')[::2] for word in words if word.startswith('--'))
        for flag, value in flags.items():
            pattern = GCLOUD[command][flag]
            assert value == '' if pattern is None else re.fullmatch(pattern, value), f'{command} {flag}={value}'
        assert REQUIRED.get(command, set()) <= flags.keys()
        positional = [word for word in words if not word.startswith('--')]
        assert len(positional) == (2 if command == 'tpu-vm scp' else 1) and 'evit' in positional[-1]


@pytest.mark.parametrize('options', [[], ['--spot']])
def test_create_requests_queued_resources_of_the_given_capacity(options, cloud):
    create = printed(cloud.run('tpu_vm.sh', 'create', *TPU, '--type=v6e-256', *options, '--dry-run'))[0]
    assert create[3:5] == ['queued-resources', 'create'] and ('--spot' in create) == bool(options)
