"""Output of measurements: tables, JSON, and the check that a file can be written."""

import json
import re

import numpy as np
import pytest

from evit_jax.benchmarks import report


def test_check_writable_refuses_bad_files_and_creates_none(tmp_path):
    (tmp_path / 'file').write_text('kept')
    with pytest.raises(ValueError, match=r'--json=.*file/x.json cannot be written .*: name a file in a folder'):
        report.check_writable('--json', tmp_path / 'file' / 'x.json')
    with pytest.raises(ValueError, match=r'--markdown=.* cannot be written'):
        report.check_writable('--markdown', tmp_path)
    report.check_writable('--json', tmp_path / 'file')
    report.check_writable('--json', tmp_path / 'new' / 'x.json')
    assert (tmp_path / 'file').read_text() == 'kept' and not (tmp_path / 'new' / 'x.json').exists()


def test_table_columns_are_aligned():
    lines = report.table(('', 'images/s'), [('read', '1,000'), ('a long name', '7')]).splitlines()
    assert lines == ['             images/s', '---------------------', 'read            1,000', 'a long name         7']


def test_write_json_adds_machine_versions_and_date(tmp_path):
    report.write_json(tmp_path / 'deep' / 'file.json', {'rows': [1]})
    written = json.loads((tmp_path / 'deep' / 'file.json').read_text())
    assert written['rows'] == [1]
    assert re.fullmatch(r'\d{4}-\d\d-\d\dT.*', written['machine']['date'])
    assert written['machine']['versions']['numpy'] == np.__version__ and written['machine']['cpus'] >= 1
