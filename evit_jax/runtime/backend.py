"""The backend that JAX computes on: started before anything else, so that a missing one is named as what it is."""

import jax


def start() -> None:
    """Starts JAX's backend; call it after `jax.distributed.initialize` and before a file is read or written.

    Raises:
      ValueError: the requested platform has no backend here; names it, and the platforms that this machine has.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the second has no text: a platform whose plugin is missing
        requested = jax.config.jax_platforms or 'automatic'
        reason = first_line(error, 'its plugin is not installed').partition(" (set JAX_PLATFORMS=''")[0]
        raise ValueError(f'JAX has no backend for the requested platform, JAX_PLATFORMS={requested} ({reason}); this '
                         f'machine has {", ".join(_available())}: set JAX_PLATFORMS to one of these or unset it, or '
                         f'install what {requested} needs') from error


def first_line(error: BaseException, otherwise: str = '') -> str:
    """The first line of an error's text; of an error without text `otherwise`, or else its representation."""
    return str(error).strip().partition('\n')[0].rstrip() or otherwise or repr(error)


def _available() -> list[str]:
    """The platforms that JAX finds by itself; the CPU is always one of them."""
    before = jax.config.jax_platforms
    jax.config.update('jax_platforms', None)
    try:
        return sorted({device.platform for device in jax.devices()} | {'cpu'})
    except (RuntimeError, AssertionError):
        return ['cpu']
    finally:
        jax.config.update('jax_platforms', before)
