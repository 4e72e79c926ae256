"""Data: from files, hub datasets or rows to batches of static shape.

load_dataset -> prepare_dataset (formats, chat template, tokens, masks) -> train_on_responses_only -> pack ->
Batches

Rows with images: VisionDataCollator.prepare (formats, images opened and checked, tokens, masks) -> … -> pack ->
VisionBatches
"""

from jaxtune.data.batches import Batches, buckets
from jaxtune.data.columns import content_digest
from jaxtune.data.image_batches import VisionBatches
from jaxtune.data.image_pairs import prepare_image_pairs
from jaxtune.data.image_rows import has_images
from jaxtune.data.packing import pack
from jaxtune.data.preferences import PAIR_COLUMNS, pair_rows, prepare_preferences
from jaxtune.data.prepare import PreparationReport, preparation_report, prepare_dataset
from jaxtune.data.responses import train_on_responses_only
from jaxtune.data.sharegpt import standardize_data_formats, standardize_sharegpt, to_sharegpt
from jaxtune.data.sources import load_dataset
from jaxtune.data.statistics import TokenStatistics, render_example, token_statistics
from jaxtune.data.templates import CHAT_TEMPLATES, get_chat_template
from jaxtune.data.vision import UnslothVisionDataCollator, VisionDataCollator
