"""Plan files of the plan search are exported under the names of their files."""

import json

from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.plan_file import PlanFile
from evit_jax.serving import loader
from tests.helpers import exports

checkpoint, export, run = exports.checkpoint, exports.export, exports.run


def test_export_plan_file_names_the_plan(checkpoint, run, tmp_path):
    plan_file = PlanFile.of(make_plan(16, 2, tokens=(5,), reduce_at=(1,), fuse=False), 'vit_layouts', 16)
    (tmp_path / 'fast.json').write_text(json.dumps(plan_file.metadata()))
    code, errors = run(checkpoint, tmp_path / 'out', f'--plan={tmp_path / "fast.json"}', '--platforms=cpu')
    assert code == 0, errors
    assert list(loader.Served(tmp_path / 'out').programs) == ['fast']
    plan = json.loads((tmp_path / 'out' / 'manifest.json').read_text())['plans']['fast']
    assert (plan['tokens'], plan['reductions'], plan['fused']) == ([5], [1], False)


def test_export_plan_file_with_the_longest_name_is_exported(checkpoint, run, tmp_path):
    plan_file, long = PlanFile.of(make_plan(16, 2, tokens=(5,), reduce_at=(1,)), 'vit_layouts', 16), 'p' * 250
    (tmp_path / f'{long}.json').write_text(json.dumps(plan_file.metadata()))
    code, errors = run(checkpoint, tmp_path / 'out', f'--plan={tmp_path / long}.json', '--platforms=cpu')
    assert code == 0, errors
    assert list(loader.Served(tmp_path / 'out').programs) == [long]


def test_export_two_plans_of_one_name_are_refused(checkpoint, run, tmp_path):
    plan_file = PlanFile.of(make_plan(16, 2, tokens=(5,), reduce_at=(1,)), 'vit_layouts', 16)
    files = [tmp_path / path for path in ('a/p.json', 'b/p.json', '0.5.json')]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(plan_file.metadata()))
    for words in ([f'--plan={files[0]}', f'--plan={files[1]}'], ['--rates=0.5', f'--plan={files[2]}']):
        code, errors = run(checkpoint, tmp_path / 'out', *words)
        assert code == 2 and f'{words[0].removesuffix("=0.5")} and {words[1]} give two plans the name' in errors
