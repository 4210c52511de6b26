"""Tables of model benchmarks for the terminal and for Markdown."""

import re

from evit_jax.benchmarks import model_tables


def make_measurement(**changes):
    row = {'case': 'a case', 'engine': 'jax', 'step': 'inference', 'parameters': 22_050_000, 'macs': 4_600_000_000,
           'executed_macs': 4_310_000_000,
           'compile_seconds': 12.34, 'memory_bytes': 1.2e8, 'memory_from': 'compiler', 'images_per_second': 1234.56,
           'latency_p50_ms': None, 'latency_p95_ms': None, 'speedup_over_dense': 1.5, 'macs_dense_over_this': 1.518,
           'share_of_matmul': 0.4, 'ours_over_this': 1.0}
    other = row | {'engine': 'torch', 'images_per_second': 1000.0, 'ours_over_this': 1.23}
    return {'device': 'cpu', 'platform': 'cpu', 'threads': 2, 'rounds': 9, 'torch': '2.13',
            'matmul_flops_per_second': {'float32': 2e11}, 'rows': [row, other]} | changes


def test_tables_of_two_engines_have_a_column_for_each():
    (headers, rows), (engines, beside), speedups, memory = model_tables.tables(make_measurement())
    assert dict(zip(headers, rows[0])) == {
        '': 'a case', 'M params': '22.05', 'G MACs': '4.60', 'executed': '4.31', 'compile s': '12.3', 'MB': '120.0',
        'images/s': '1,234.6', 'p50 ms': '-', 'p95 ms': '-', 'speed-up': '1.50', 'fewer MACs': '1.52',
        'of product': '40.0%'}
    assert (engines, beside) == (('images/s', 'jax', 'torch'), [('a case', '1,234.6', '1,000.0 (1.23)')])
    assert speedups == (('speed-up over its own dense', 'jax', 'torch'), [('a case', '1.50', '1.50')])
    assert memory == (('MB', 'jax', 'torch'), [('a case', '120.0', '120.0')])


def test_tables_at_batch_1_have_the_latency_of_each_engine():
    measurement = make_measurement()
    for row in measurement['rows']:
        row |= {'latency_p50_ms': 10.0, 'latency_p95_ms': 12.5}
    latency = next(table for table in model_tables.tables(measurement) if table[0][0] == 'p50 / p95 ms')
    assert latency[1] == [('a case', '10.00 / 12.50', '10.00 / 12.50')]


def test_markdown_has_tables_machine_versions_and_date():
    text = model_tables.markdown(make_measurement())
    assert '| a case | 22.05 | 4.60 | 4.31 |' in text and '| --- | ---: | ---: |' in text
    assert re.search(r'\n20\d\d-\d\d-\d\d, .*, 2 threads for each engine, .*jax \d.*torch 2.13\n', text)
    assert "by the compiler's analysis" in text and '200 GFLOP/s in float32' in text
