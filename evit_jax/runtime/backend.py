"""Starts JAX's backend before anything else, so that a missing backend is reported as such."""

import jax


def start() -> None:
    """Starts JAX's backend. Call it after `jax.distributed.initialize`, before any file is read or written.

    Raises:
      ValueError: the requested platform has no backend here. The message names it and the platforms of this machine.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # an AssertionError without text: the platform's plugin is missing
        requested = jax.config.jax_platforms or 'automatic'
        reason = first_line(error, 'its plugin is not installed').partition(" (set JAX_PLATFORMS=''")[0]
        raise ValueError(f'JAX has no backend for the requested platform, JAX_PLATFORMS={requested} ({reason}); this '
                         f'machine has {", ".join(_available_platforms())}: set JAX_PLATFORMS to one of these or unset '
                         f'it, or install what {requested} needs') from error


def first_line(error: BaseException, default: str = '') -> str:
    """Returns the first line of an error's text; without text, the default or the error's representation."""
    return str(error).strip().partition('\n')[0].rstrip() or default or repr(error)


def _available_platforms() -> list[str]:
    """Returns the platforms that JAX finds by itself. The CPU is always among them."""
    before = jax.config.jax_platforms
    jax.config.update('jax_platforms', None)
    try:
        return sorted({device.platform for device in jax.devices()} | {'cpu'})
    except (RuntimeError, AssertionError):
        return ['cpu']
    finally:
        jax.config.update('jax_platforms', before)
