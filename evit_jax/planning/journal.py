"""A file of the errors of evaluated plans, from which a stopped search continues."""

import json

import numpy as np
from absl import logging


class Journal:
    """Stores the errors of evaluated plans, also in a file. A stopped search continues from the file."""

    def __init__(self, path: str = '', key: str = ''):
        """Reads the file if it exists and belongs to the same search.

        Args:
          key: digest of model, images and settings; a file with another key is written anew.
        """
        self._path, self._errors = path, {}
        if not path:
            return
        try:
            with open(path, encoding='utf-8') as file:
                lines = [json.loads(line) for line in file if line.endswith('\n')]
            if lines and lines[0].get('search') == key:
                self._errors = {line['plan']: np.array(line['errors']) for line in lines[1:]}
                logging.info('%d evaluated plans are read from %s', len(self._errors), path)
                return
        except (OSError, ValueError, KeyError, AttributeError):
            pass
        self._write({'search': key}, 'w')

    def get(self, plan: str) -> np.ndarray | None:
        """Returns the errors of a plan, [B]; None if it was not evaluated."""
        return self._errors.get(plan)

    def add(self, plan: str, errors: np.ndarray) -> None:
        """Adds the errors of a plan."""
        self._errors[plan] = errors
        if self._path:
            self._write({'plan': plan, 'errors': errors.tolist()}, 'a')

    def _write(self, content, mode):
        with open(self._path, mode, encoding='utf-8') as file:
            file.write(json.dumps(content) + '\n')
