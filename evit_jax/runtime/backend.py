"""Starts JAX's backend early, with a clear error if the backend is missing."""

import jax


def start() -> None:
    """Starts JAX's backend. Call it after `jax.distributed.initialize`, before any file is read or written.

    Raises:
      ValueError: the requested platform has no backend on this machine. The message lists the available platforms.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: the platform's plugin is missing
        requested = jax.config.jax_platforms or 'automatic'
        reason = first_line(error, 'its plugin is not installed').partition(" (set JAX_PLATFORMS=''")[0]
        raise ValueError(f'JAX has no backend for the requested platform, JAX_PLATFORMS={requested} ({reason}); this '
                         f'machine has {", ".join(_available_platforms())}: set JAX_PLATFORMS to one of these or unset '
                         f'it, or install what {requested} needs') from error


def first_line(error: BaseException, default: str = '') -> str:
    """Returns the first line of an error's text. If the text is empty, returns the default or `repr(error)`."""
    return str(error).strip().partition('\n')[0].rstrip() or default or repr(error)


def _available_platforms() -> list[str]:
    """Returns the platforms that JAX detects, always including the CPU."""
    before = jax.config.jax_platforms
    jax.config.update('jax_platforms', None)
    try:
        return sorted({device.platform for device in jax.devices()} | {'cpu'})
    except (RuntimeError, AssertionError):
        return ['cpu']
    finally:
        jax.config.update('jax_platforms', before)
