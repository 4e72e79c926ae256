import pytest
from gguf_tokenisers import sentencepiece, write_model_file

from jaxtune.formats.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, read_pieces


def test_pieces_of_a_model(tmp_path):
    core = sentencepiece()
    pieces = read_pieces(write_model_file(core, tmp_path / "tokenizer.model"))
    vocab = core.get_vocab()
    assert {piece.text: i for i, piece in enumerate(pieces)} == vocab
    assert [piece.kind for piece in pieces[:4]] == [UNKNOWN, CONTROL, CONTROL, BYTE]
    assert all(piece.kind == NORMAL for piece in pieces[259:])
    scores = [piece.score for piece in pieces]
    assert min(scores) < -100 and max(scores) == 0.0


def test_a_published_model(shared_data):
    pieces = read_pieces(shared_data / "tokenizers" / "mistral_v3" / "tokenizer.model")
    assert len(pieces) == 32768
    assert (pieces[1].text, pieces[1].kind) == ("<s>", CONTROL)
    assert (pieces[1029].text, pieces[1029].score) == ("▁t", -2.0)


@pytest.mark.parametrize("data", [b"", b"GGUF\0\0", b"\x0a\x7fab", b"{'model': 1}", b"\xff" * 40])
def test_other_files_are_refused(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError, match="is no SentencePiece model"):
        read_pieces(tmp_path / "x")
