"""TFRecord files of a tfds data set to array_record, without TensorFlow: python -m evit_jax.convert_data SRC DST

SRC is the folder with dataset_info.json, as ~/tensorflow_datasets/imagenet2012/5.1.0; DST is made. Stopped, and started
again, it goes on where it was. Converting is not needed for training: source 'tfds' reads both.
"""

from evit_jax import commandline
from evit_jax.data.to_array_record import convert_to_array_record

if __name__ == '__main__':
    commandline.run(convert_to_array_record, 'SRC', 'DST')
