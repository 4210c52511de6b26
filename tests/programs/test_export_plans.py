"""Plans of the planner in an exported model: named by their files, whatever the files' names are."""

import json

from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.plan_file import PlanFile
from evit_jax.serving import loader
from tests.programs import test_export

least, checkpoint, export, run = test_export.least, test_export.checkpoint, test_export.export, test_export.run


def test_a_plan_of_the_planner_is_exported_under_the_name_of_its_file(checkpoint, run, tmp_path, monkeypatch):
    planned = PlanFile.of(make_plan(16, 2, tokens=(5,), reduce_at=(1,), fuse=False), 'vit_layouts', 16)
    (tmp_path / 'fast.json').write_text(json.dumps(planned.metadata()))
    code, said = run(monkeypatch, checkpoint, tmp_path / 'out', f'--plan={tmp_path / "fast.json"}', '--platforms=cpu')
    assert code == 0, said
    assert list(loader.Served(tmp_path / 'out').programs) == ['fast']
    plan = json.loads((tmp_path / 'out' / 'manifest.json').read_text())['plans']['fast']
    assert (plan['tokens'], plan['reductions'], plan['fused']) == ([5], [1], False)


def test_a_plan_file_with_a_name_as_long_as_can_be_is_exported(checkpoint, run, tmp_path, monkeypatch):
    planned, long = PlanFile.of(make_plan(16, 2, tokens=(5,), reduce_at=(1,)), 'vit_layouts', 16), 'p' * 250
    (tmp_path / f'{long}.json').write_text(json.dumps(planned.metadata()))
    code, said = run(monkeypatch, checkpoint, tmp_path / 'out', f'--plan={tmp_path / long}.json', '--platforms=cpu')
    assert code == 0, said
    assert list(loader.Served(tmp_path / 'out').programs) == [long]


def test_two_plan_files_of_one_name_are_both_named(checkpoint, run, tmp_path, monkeypatch):
    planned = PlanFile.of(make_plan(16, 2, tokens=(5,), reduce_at=(1,)), 'vit_layouts', 16)
    files = [tmp_path / place for place in ('a/p.json', 'b/p.json', '0.5.json')]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(planned.metadata()))
    for words in ([f'--plan={files[0]}', f'--plan={files[1]}'], ['--rates=0.5', f'--plan={files[2]}']):
        code, said = run(monkeypatch, checkpoint, tmp_path / 'out', *words)
        assert code == 2 and f'{words[0].removesuffix("=0.5")} and {words[1]} are two plans of one name' in said
