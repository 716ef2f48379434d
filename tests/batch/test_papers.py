from __future__ import annotations

import os
from pathlib import Path

import pytest
from fpdf import FPDF
from hypothesis import given
from hypothesis import strategies as st

from balancer.batch import pdf_text
from balancer.batch.papers import PaperFault, decode, expand, load, text_of

from .conftest import MakePdf


async def read(path: Path) -> str:
    return await text_of(load(path))


async def test_a_pdf_gives_its_running_text(make_pdf: MakePdf):
    pages = [f"Foxes of kind {kind} are quick and they are brown." for kind in ("red", "grey", "arctic")]
    text = await read(make_pdf("p.pdf", *pages, head="Journal of Foxes", numbered=True))
    assert text == "\n".join(pages)


async def test_a_damaged_pdf_is_a_fault_of_that_paper(tmp_path: Path):
    (tmp_path / "p.pdf").write_bytes(b"%PDF-1.7\nnothing of the kind")
    with pytest.raises(PaperFault, match="damaged"):
        await read(tmp_path / "p.pdf")


async def test_a_scan_is_told_what_to_do(tmp_path: Path):
    pdf = FPDF()
    pdf.add_page()
    pdf.rect(20, 20, 100, 100, style="F")
    pdf.output(str(tmp_path / "p.pdf"))
    with pytest.raises(PaperFault, match=r"scan.*ocrmypdf"):
        await read(tmp_path / "p.pdf")


async def test_a_protected_pdf_is_told_what_to_do(tmp_path: Path):
    pdf = FPDF()
    pdf.set_encryption(owner_password="owner", user_password="user")
    pdf.add_page()
    pdf.set_font("Helvetica")
    pdf.cell(text="Secret foxes.")
    pdf.output(str(tmp_path / "p.pdf"))
    with pytest.raises(PaperFault, match="protected by a password"):
        await read(tmp_path / "p.pdf")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("Füchse".encode(), "Füchse"),
        ("Füchse".encode("utf-8-sig"), "Füchse"),
        ("Füchse".encode("latin-1"), "Füchse"),
        ("“Füchse”".encode("cp1252"), "“Füchse”"),
        ("Füchse".encode("utf-16"), "Füchse"),
        (b"\x81\xe4", "ä"),
    ],
)
async def test_text_files_are_read_in_the_encodings_that_people_have(data: bytes, text: str, tmp_path: Path):
    (tmp_path / "p.txt").write_bytes(data)
    assert await read(tmp_path / "p.txt") == text


@given(st.binary())
def test_any_bytes_are_text_or_a_fault(data: bytes):
    try:
        decode(data)
    except PaperFault:
        assert b"\0" in data


@pytest.mark.parametrize(("data", "reason"), [(b"", "empty"), (b" \n ", "empty"), (b"a\0b", "not text")])
async def test_a_text_file_without_text_is_a_fault(data: bytes, reason: str, tmp_path: Path):
    (tmp_path / "p.md").write_bytes(data)
    with pytest.raises(PaperFault, match=reason):
        await read(tmp_path / "p.md")


async def test_a_text_file_longer_than_any_paper_is_a_fault(tmp_path: Path):
    (tmp_path / "p.txt").write_bytes(b"a" * (pdf_text.MAX_CHARS + 1))
    with pytest.raises(PaperFault, match="more than 20000000 characters: it is no paper"):
        await read(tmp_path / "p.txt")


def test_a_pipe_is_no_paper_and_keeps_nobody_waiting(tmp_path: Path):
    (tmp_path / "in").mkdir()
    pipe = tmp_path / "in" / "p.txt"
    os.mkfifo(pipe)
    with pytest.raises(PaperFault, match=r"p\.txt is no file"):
        expand([pipe], out=tmp_path / "out")
    assert expand([tmp_path / "in"], out=tmp_path / "out") == []
    with pytest.raises(PaperFault, match="it is no file"):
        load(pipe)


def test_a_file_that_is_gone_is_a_fault(tmp_path: Path):
    with pytest.raises(PaperFault, match="cannot be read: No such file"):
        load(tmp_path / "p.md")


def test_folders_stand_for_their_papers_and_each_paper_counts_once(tmp_path: Path):
    for name in (
        "in/b.md",
        "in/a.pdf",
        "in/deep/c.TXT",
        "in/.hidden/d.md",
        "in/e.docx",
        "in/out/f.md",
        "in/README.md",
        "z.md",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    named = [tmp_path / "z.md", tmp_path / "in", tmp_path / "in" / "a.pdf"]
    found = expand(named, out=tmp_path / "in" / "out")
    assert [path.name for path in found] == ["z.md", "a.pdf", "b.md", "c.TXT"]


def test_what_is_no_paper_is_refused_by_name(tmp_path: Path):
    (tmp_path / "a.docx").touch()
    with pytest.raises(PaperFault, match=r"a\.docx is none of \.pdf"):
        expand([tmp_path / "a.docx"], out=tmp_path / "out")
    with pytest.raises(PaperFault, match="there is no file or folder"):
        expand([tmp_path / "missing.pdf"], out=tmp_path)


@pytest.mark.parametrize("named", [".", "a.md"])
def test_reports_are_not_written_among_the_papers(named: str, tmp_path: Path):
    (tmp_path / "a.md").touch()
    with pytest.raises(PaperFault, match="among the papers"):
        expand([tmp_path / named], out=tmp_path)


def test_the_sample_papers_are_papers():
    folder = Path(__file__).parents[2] / "docs" / "papers"
    found = expand([folder], out=folder / "out")
    assert [path.name for path in found] == ["gwpopulation.md", "spiceypy.txt", "xrtpy.md"]
    assert all(len(load(path).data.split()) > 500 for path in found)
