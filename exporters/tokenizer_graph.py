"""The tokenizer as a graph beside the program: one text in, the program's inputs out, by operators that an extension of
the runtime brings (openvino-tokenizers, onnxruntime-extensions)."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import InputError, first_line
from ..models.checkpoint import Checkpoint
from .settings import ShapeRange

if TYPE_CHECKING:
    import onnx

Tokenize = Callable[[str], Mapping[str, np.ndarray]]
"""A text to int64 arrays [1, tokens] by name: `input_ids`, `attention_mask` and, of some, `token_type_ids`."""

ONNX_FILE = "tokenizer.onnx"
OPENVINO_FILE = "openvino_tokenizer.xml"
_HINT = "Leave --tokenizer-graph out: the artifact carries the tokenizer all the same."

# What follows an operator that reads one text into ids. Cut as transformers does it on the right: the text loses
# tokens, what ends every text (`[SEP]`) stays.
_AFTER_READING = """
<ir_version: 8, opset_import: ["" : 18]>
tokenizer (string[1] text) => (int64[1, m] input_ids, int64[1, m] attention_mask, int64[1, m] token_type_ids) {{
    row = Constant <value_ints = [1, -1]> ()
    sequence = Constant <value_ints = [1]> ()
    start = Constant <value_ints = [0]> ()
    longest = Constant <value_ints = [{longest}]> ()
    ending = Constant <value_ints = [{ending}]> ()
    padding = Constant <value_int = {pad}> ()
    zero = Constant <value_int = 0> ()
    none = Constant <value_ints = [0, 0, 0]> ()
    whole = Reshape (read, row)
    size = Shape <start = 1> (whole)
    kept = Min (size, longest)
    upto = Sub (kept, ending)
    from = Sub (size, ending)
    words = Slice (whole, start, upto, sequence)
    end = Slice (whole, from, size, sequence)
    cut = Concat <axis = 1> (words, end)
    shape = Shape (cut)
    ones = ConstantOfShape <value = int64[1] {{1}}> (shape)
    missing = Sub ({filled}, kept)
    amounts = Concat <axis = 0> (none, missing)
    input_ids = Pad (cut, amounts, padding)
    attention_mask = Pad (ones, amounts, zero)
    token_type_ids = Sub (attention_mask, attention_mask)
}}
"""


@dataclass(frozen=True)
class TextTokens:
    """What a tokenizer makes of one text for a program: cut at `longest` tokens, and padded to that where the program
    takes no shorter texts. It is what a graph of the tokenizer has to do."""

    tokenizer: PreTrainedTokenizerBase
    longest: int
    padded: bool

    @classmethod
    def of(cls, checkpoint: Checkpoint, shapes: ShapeRange) -> TextTokens:
        """With a tokenizer of its own, for converters change what they are given."""
        tokenizer = copy.deepcopy(checkpoint.tokenizer)
        if checkpoint.task.name == "text-generation":  # as the card's programs pad
            tokenizer.padding_side = "right"
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return cls(tokenizer, shapes.max_sequence, shapes.min_sequence > 1)

    def __call__(self, text: str) -> dict[str, np.ndarray]:
        """The tokenizer's own answer; see `Tokenize`."""
        padding = "max_length" if self.padded else False
        tokens = self.tokenizer([text], truncation=True, max_length=self.longest, padding=padding)
        return {name: np.array(values, dtype=np.int64) for name, values in tokens.items()}

    @property
    def ending(self) -> int:
        """How many tokens end every text, whatever it says."""
        special = self.tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        return next((place for place, added in enumerate(reversed(special)) if not added), 0)


def write_openvino_tokenizer(tokens: TextTokens, folder: Path) -> Tokenize:
    """Write `openvino_tokenizer.xml` and `.bin`; returns what runs them.

    Raises:
        InputError: a tokenizer that openvino-tokenizers does not know.
    """
    import openvino
    import openvino_tokenizers

    try:
        graph = openvino_tokenizers.convert_tokenizer(
            copy.deepcopy(tokens.tokenizer), truncation=True, max_length=tokens.longest, use_max_padding=tokens.padded
        )
    except Exception as error:  # of many kinds, for it meets what it does not know anywhere
        raise _unknown("openvino-tokenizers", tokens, first_line(error)) from error
    openvino.save_model(graph, folder / OPENVINO_FILE, compress_to_fp16=False)
    compiled = openvino.Core().compile_model(folder / OPENVINO_FILE, "CPU", {"INFERENCE_NUM_THREADS": 1})

    def tokenize(text: str) -> dict[str, np.ndarray]:
        found = compiled([text])
        return {port.any_name: np.array(found[port]) for port in compiled.outputs}

    return tokenize


def write_onnx_tokenizer(tokens: TextTokens, folder: Path) -> Tokenize:
    """Write `tokenizer.onnx`, which takes one text a call; returns what runs it.

    Raises:
        InputError: a tokenizer that is neither WordPiece nor a byte-level BPE, the ones that onnxruntime-extensions was
            seen to read rightly.
    """
    import onnx
    import onnxruntime
    from onnxruntime_extensions import get_library_path

    pad = tokens.tokenizer.pad_token_id or 0
    filled = "longest" if tokens.padded else "kept"
    rest = _AFTER_READING.format(longest=tokens.longest, ending=tokens.ending, pad=pad, filled=filled)
    onnx.save(_joined(_reading(tokens), onnx.parser.parse_model(rest)), folder / ONNX_FILE)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(get_library_path())
    session = onnxruntime.InferenceSession(folder / ONNX_FILE, options, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_outputs()]

    def tokenize(text: str) -> dict[str, np.ndarray]:
        return dict(zip(names, session.run(names, {"text": [text]}), strict=True))

    return tokenize


def _joined(reading: onnx.ModelProto, rest: onnx.ModelProto) -> onnx.ModelProto:
    """What follows the reading, with the reading before it."""
    (node,) = reading.graph.node
    node.input[:] = ["text"]
    node.output[:] = ["read", *(f"read_{name}" for name in node.output[1:])]
    rest.graph.node.insert(0, node)
    rest.opset_import.extend(library for library in reading.opset_import if library.domain)
    return rest


def _reading(tokens: TextTokens) -> Any:
    """A model of the one operator that reads a text into ids, its first output."""
    from onnxruntime_extensions import gen_processing_models

    if not tokens.tokenizer.is_fast:
        raise _unknown("onnxruntime-extensions", tokens, "it is written in Python")
    known = json.loads(tokens.tokenizer.backend_tokenizer.to_str())
    kind = known["model"]["type"]
    if kind == "WordPiece":
        reading, _ = gen_processing_models("BertTokenizer", pre_kwargs=_word_pieces(tokens, known))
    elif kind == "BPE" and "ByteLevel" in json.dumps(known["pre_tokenizer"]):
        # Its attributes are the two files of a tokenizer; the class named there is the one by which it knows the bytes.
        settings = {**tokens.tokenizer.special_tokens_map, "tokenizer_class": "GPT2Tokenizer"}
        files = {**known, "truncation": None, "padding": None}, settings
        attributes = dict(zip(("tokenizer_vocab", "tokenizer_config"), map(json.dumps, files), strict=True))
        reading, _ = gen_processing_models("HfJsonTokenizer", pre_kwargs=attributes)
    else:
        reason = f"limbeck makes graphs of WordPiece and byte-level BPE, not {kind}"
        raise _unknown("onnxruntime-extensions", tokens, reason)
    return reading


def _word_pieces(tokens: TextTokens, known: dict[str, Any]) -> dict[str, Any]:
    """Attributes of the operator BertTokenizer."""
    vocabulary = sorted(known["model"]["vocab"].items(), key=lambda item: int(item[1]))
    normalizer = known["normalizer"] or {}
    lower = bool(normalizer.get("lowercase"))
    accents = normalizer.get("strip_accents")
    tokenizer = tokens.tokenizer
    return {
        "vocab": "\n".join(word for word, _ in vocabulary),
        "do_lower_case": int(lower),
        "strip_accents": int(lower if accents is None else accents),  # not given: as the case is
        "tokenize_chinese_chars": int(bool(normalizer.get("handle_chinese_chars"))),
        "unk_token": tokenizer.unk_token,
        "cls_token": tokenizer.cls_token,
        "sep_token": tokenizer.sep_token,
        "suffix_indicator": known["model"]["continuing_subword_prefix"],
    }


def _unknown(package: str, tokens: TextTokens, reason: str) -> InputError:
    kind = type(tokens.tokenizer).__name__
    return InputError(f"{package} makes no graph of this tokenizer ({kind}): {reason.removesuffix('.')}.", _HINT)
