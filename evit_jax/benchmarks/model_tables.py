"""The figures of models as tables for the screen and for Markdown."""

from collections.abc import Sequence
from typing import Any

from evit_jax.benchmarks import report
from evit_jax.benchmarks.subjects import OURS

Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # headers, rows
_NOTHING = '-'
_COLUMNS = {
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


def tables(measured: dict[str, Any]) -> list[Table]:
    """Ours; and where PyTorch was measured, images/s of all engines side by side."""
    rows = measured['rows']
    ours = [row for row in rows if row['engine'] == OURS]
    found = [(('', *_COLUMNS), [(row['case'], *_cells(row)) for row in ours])]
    engines = list(dict.fromkeys(row['engine'] for row in rows))
    if len(engines) > 1:
        by_case = {(row['case'], row['engine']): row for row in rows}
        found.append((('images/s', *engines), [
            (row['case'], *(_beside(by_case[row['case'], engine]) for engine in engines)) for row in ours
            if (row['case'], engines[1]) in by_case]))
    return found


def remarks(measured: dict[str, Any]) -> list[str]:
    """What the columns mean, and what was measured how."""
    rows = measured['rows']
    products = ', '.join(f'{flops / 1e9:,.0f} GFLOP/s in {dtype}'
                         for dtype, flops in measured['matmul_flops_per_second'].items())
    sources = {row['memory_from'] for row in rows if row['memory_from']}
    memory = {'compiler': "by the compiler's analysis", 'device': 'as the device says'}
    said = [
        f'images/s: median of {measured["rounds"]} rounds, in each of which everything is timed once, in another '
        'order; ratios are medians of those in each round. Latency: of single calls at batch 1.',
        'speed-up: over dense, realised; fewer MACs: what it would be if time were as MACs.',
        'G MACs: as the papers count them; executed: in inference, without what of the last block no head reads.',
        'of product: share of the speed of a large matrix product, by what is executed, timed in turns with the rest: '
        f'{products}.',
        f'MB: weights, input and what the program needs, at the peak, {" or ".join(memory[name] for name in sources)}.']
    if any(row['speedup_over_dense'] is None for row in rows):
        said.append('No speed-up without rate 1 among --rates.')
    if any(row['step'] == 'train' for row in rows):
        said.append('train: the training step with its augmentation on the device, optimizer and average; its FLOPs '
                    'are counted as three times those of the forward pass.')
    if 'torch' in measured:
        said.append('Behind the images/s of an engine: how many times as fast ours is. Their logits agree with ours on '
                    'the same weights and images.')
    return said


def metadata(measured: dict[str, Any]) -> str:
    """On what it was measured, in a line."""
    machine = report.machine()
    versions = {name: machine['versions'][name] for name in ('jax', 'jaxlib', 'flax')}
    versions |= {'torch': measured['torch']} if 'torch' in measured else {}
    threads = f', {measured["threads"]} threads' if 'threads' in measured else ''
    threads += ' on both sides' if threads and 'torch' in measured else ''
    where = machine['processor'] if measured['platform'] == 'cpu' else measured['device']
    return (f'{machine["date"][:10]}, {where}{threads}, Python {machine["python"]}, '
            + ', '.join(f'{name} {version}' for name, version in versions.items()))


def markdown(measured: dict[str, Any]) -> str:
    """All of it as a file."""
    written = [report.markdown_table(*table) for table in tables(measured)]
    parts = ['# How fast the models are', metadata(measured), *written,
             '\n'.join(f'- {remark}' for remark in remarks(measured))]
    return '\n\n'.join(parts) + '\n'


def _cells(row):
    return [_NOTHING if row[key] is None else said(row[key]) for key, said in _COLUMNS.values()]


def _beside(row):
    """images/s, and behind those of others how ours stand to them."""
    speed = f'{row["images_per_second"]:,.1f}'
    return speed if row['engine'] == OURS else f'{speed} ({row["ours_over_this"]:.2f})'
