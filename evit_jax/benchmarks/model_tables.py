"""Formats the results of `model_speed.measure` as tables for the terminal and for Markdown."""

from collections.abc import Sequence
from typing import Any

from evit_jax.benchmarks import attention_speed, report
from evit_jax.benchmarks.cases import JAX

Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # headers, rows
_EMPTY = '-'
_COLUMNS = {  # header -> key of a row, format
    'M params': ('parameters', lambda value: f'{value / 1e6:,.2f}'),
    'G MACs': ('macs', lambda value: f'{value / 1e9:#,.3g}'),
    'executed': ('executed_macs', lambda value: f'{value / 1e9:#,.3g}'),
    'compile s': ('compile_seconds', lambda value: f'{value:,.1f}'),
    'MB': ('memory_bytes', lambda value: f'{value / 1e6:,.1f}'),
    'images/s': ('images_per_second', lambda value: f'{value:,.1f}'),
    'p50 ms': ('latency_p50_ms', lambda value: f'{value:,.2f}'),
    'p95 ms': ('latency_p95_ms', lambda value: f'{value:,.2f}'),
    'speed-up': ('speedup_over_dense', lambda value: f'{value:.2f}'),
    'fewer MACs': ('macs_dense_over_this', lambda value: f'{value:.2f}'),
    'of product': ('share_of_matmul', lambda value: f'{value:.1%}')}


def tables(measurement: dict[str, Any]) -> list[Table]:
    """Returns the table of our models. If other engines were measured, more tables compare all engines: images/s, the
    speed-up of each over its own dense model, latency and memory.
    """
    rows = measurement['rows']
    ours = [row for row in rows if row['engine'] == JAX]
    result = [(('', *_COLUMNS), [(row['case'], *_cells(row)) for row in ours])]
    engines = list(dict.fromkeys(row['engine'] for row in rows))
    if len(engines) > 1:
        by_case = {(row['case'], row['engine']): row for row in rows}
        compared = [row['case'] for row in ours if (row['case'], engines[1]) in by_case]
        for title, text in _COMPARED.items():
            cells = [(case, *(text(by_case[case, engine]) for engine in engines)) for case in compared]
            if cells := [line for line in cells if {*line[1:]} != {_EMPTY}]:
                result.append(((title, *engines), cells))
    if 'attention' in measurement:
        result.append(attention_speed.table(measurement['attention']))
    return result


def remarks(measurement: dict[str, Any]) -> list[str]:
    """Returns lines that explain the columns and the method of measurement."""
    rows = measurement['rows']
    products = ', '.join(f'{flops / 1e9:,.0f} GFLOP/s in {dtype}'
                         for dtype, flops in measurement['matmul_flops_per_second'].items())
    sources = {row['memory_from'] for row in rows if row['memory_from']}
    memory = {'compiler': "by the compiler's analysis", 'device': 'measured by the device',
              'process': 'as growth of the process when the engine opens the model and runs it (other engines)'}
    lines = [
        f'images/s: median of {measurement["rounds"]} rounds; each round times everything once, in a new order. Ratios '
        'are medians of the ratios of each round. Latency: single calls at batch 1.',
        'speed-up: measured, relative to dense. fewer MACs: the speed-up if time were proportional to MACs.',
        'G MACs: counted as in the papers. executed: MACs of inference, without the part of the last block that no '
        'head reads.',
        'of product: speed in executed FLOP/s relative to a large matrix product, timed in the same rounds: '
        f'{products}.',
        f'MB: peak memory of weights, input and program, {" or ".join(memory[name] for name in sorted(sources))}.']
    if any(row['speedup_over_dense'] is None for row in rows):
        lines.append('No speed-up without rate 1 among --rates.')
    if any(row['step'] == 'train' for row in rows):
        lines.append('train: the training step with augmentation on the device, optimizer and EMA; its FLOPs are '
                     'counted as three times those of the forward pass.')
    if len({row['engine'] for row in rows}) > 1:
        lines.append('In parentheses: the speed of JAX relative to this engine. Both return the same logits for the '
                     'same weights and images.')
    if measurement.get('attention'):
        lines.append('attention: speed of each implementation relative to ours; cudnn and xla are those of '
                     'jax.nn.dot_product_attention.')
    if left_out := measurement.get('left_out'):
        lines.append(f'{len(left_out)} cases did not fit in the time limit: {"; ".join(left_out)}.')
    return lines


def metadata(measurement: dict[str, Any]) -> str:
    """Returns one line with the date, the machine and the package versions."""
    machine = report.machine()
    versions = {name: machine['versions'][name] for name in ('jax', 'jaxlib', 'flax')}
    versions |= {'torch': measurement['torch']} if 'torch' in measurement else {}
    versions |= measurement.get('runtimes', {})
    threads = f', {measurement["threads"]} threads' if 'threads' in measurement else ''
    threads += ' for each engine' if threads and len(versions) > 3 else ''
    processor = machine['processor'] if measurement['platform'] == 'cpu' else measurement['device']
    return (f'{machine["date"][:10]}, {processor}{threads}, Python {machine["python"]}, '
            + ', '.join(f'{name} {version}' for name, version in versions.items()))


def markdown(measurement: dict[str, Any]) -> str:
    """Returns the tables, the metadata and the remarks as a Markdown file."""
    written = [report.markdown_table(*table) for table in tables(measurement)]
    parts = ['# Speed of the models', metadata(measurement), *written,
             '\n'.join(f'- {remark}' for remark in remarks(measurement))]
    return '\n\n'.join(parts) + '\n'


def _cells(row):
    return [_EMPTY if row[key] is None else text(row[key]) for key, text in _COLUMNS.values()]


def _speed(row):
    """Formats the images/s of a row. Other engines are followed by our speed relative to theirs."""
    speed = f'{row["images_per_second"]:,.1f}'
    return speed if row['engine'] == JAX else f'{speed} ({row["ours_over_this"]:.2f})'


def _latency(row):
    if row['latency_p50_ms'] is None:
        return _EMPTY
    return f'{row["latency_p50_ms"]:,.2f} / {row["latency_p95_ms"]:,.2f}'


def _speedup(row):
    is_reduced = row['speedup_over_dense'] is not None and row['macs_dense_over_this'] != 1
    return f'{row["speedup_over_dense"]:.2f}' if is_reduced else _EMPTY


def _memory(row):
    return _EMPTY if row['memory_bytes'] is None else f'{row["memory_bytes"] / 1e6:,.1f}'


_COMPARED = {'images/s': _speed, 'speed-up over its own dense': _speedup, 'p50 / p95 ms': _latency, 'MB': _memory}
