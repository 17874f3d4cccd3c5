"""The adapters' parts of a step, segment by segment; and the embedding, which has one too."""

from minilora_kernels.batch import SEGMENT_COLUMN, SEGMENT_END, SEGMENT_FIRST, SEGMENT_SLOT, token_at
from minilora_kernels.jit import kernel
from minilora_kernels.lora_expand import Place
from minilora_kernels.lora_pack import head_bytes, number_bytes
from minilora_kernels.pack import BLOCK, PANEL
from minilora_kernels.pointwise import embed
from minilora_kernels.sync import arrive, barrier, wait

from .rows import has_int8_adapters, input_group
from .work import share_of

# How many panels ahead B is prefetched: about the memory latency; with 16 ranks in int8 7.5 KB.
PANELS_AHEAD = 24


def make_adapters(lora_format, shrink, gather, expand):
    """(shrink_all, expand_all, embed_rows) for adapters of this format, from the kernels of one segment."""
    head, size = head_bytes(lora_format), PANEL * number_bytes(lora_format)

    @kernel
    def panel_of(c, slot, layer, which, panel):
        """The byte where a panel of B begins."""
        outputs = c.adapters.outputs
        return outputs[slot, layer, which, 0] + panel * (head + outputs[slot, layer, which, 1] * size)

    @kernel
    def shrink_all(c, layer, which, columns, group, x, quantized_row, values_row, which_out, columns_out):
        """s = scale * x A of every segment for the matrices that read input `which`. expand_all waits for it.

        x: Rows, from quantized_row on quantised for a matrix of this group, from values_row on as floats. A unit of
        work is one panel and up to 32 rows; neighbouring units read the same rows, mostly made by the thread itself.
        which_out, columns_out: the matrix that expand_all begins with, and how many columns its product has. The
        thread's last unit prefetches the first panels of its share of them.
        """
        x_row, grouped = quantized_row if has_int8_adapters(c) else values_row, input_group(group)
        inputs, b, arena, segments, units = c.adapters.inputs, c.buffers, c.adapters.arena, c.rows.segments, 0
        if len(segments) == 0:
            return
        for i in range(len(segments)):
            pieces = (segments[i, SEGMENT_END] - segments[i, SEGMENT_FIRST] + BLOCK - 1) // BLOCK
            units += pieces * (inputs[segments[i, SEGMENT_SLOT], layer, which, 1] // PANEL)
        (low, high), unit = share_of(c, units), 0
        first_out = panel_of(c, segments[0, SEGMENT_SLOT], layer, which_out, share_of(c, columns_out // PANEL)[0])
        for i in range(len(segments)):
            first, end, slot = segments[i, SEGMENT_FIRST], segments[i, SEGMENT_END], segments[i, SEGMENT_SLOT]
            at, panels = inputs[slot, layer, which, 0], inputs[slot, layer, which, 1] // PANEL
            next_slot, scale = segments[min(i + 1, len(segments) - 1), SEGMENT_SLOT], c.rows.scales[i]
            for row in range(first, end, BLOCK):
                rows, s_at = min(BLOCK, end - row), row * b.s_stride + segments[i, SEGMENT_COLUMN]
                shrunk = Place(b.s, s_at, b.s_stride, PANEL)
                then = at if row + BLOCK < end else inputs[next_slot, layer, which, 0]
                for panel in range(panels):
                    if low <= unit < high:
                        following = then if panel + 1 == panels else at + (panel + 1) * (head + columns * size)
                        # What follows this thread's last unit is another's.
                        ahead = following if unit + 1 < high else first_out
                        shrink(arena, at, ahead, columns, grouped, panel, x, x_row + row, rows, scale, shrunk)
                    unit += 1
        arrive(c.sync, c.thread)

    @kernel
    def expand_all(c, layer, which, row0, row1, low, high, to, next_which, next_low):
        """Add s B of matrix `which` to rows row0 .. row1, panels low .. high; to: Place of row row0, panel 0.

        next_which, next_low: the matrix and the panel that follow after the last segment, for prefetching.
        """
        outputs, b, arena, segments = c.adapters.outputs, c.buffers, c.adapters.arena, c.rows.segments
        last = len(segments) - 1
        if last >= 0:
            wait(c.sync, c.thread, c.threads)
        for i in range(len(segments) if low < high else 0):
            first, end = max(row0, segments[i, SEGMENT_FIRST]), min(row1, segments[i, SEGMENT_END])
            slot = segments[i, SEGMENT_SLOT]
            at, ranks = outputs[slot, layer, which, 0], outputs[slot, layer, which, 1]
            if ranks > 0 and first < end:
                s_at, column = first * b.s_stride + segments[i, SEGMENT_COLUMN], outputs[slot, layer, which, 2]
                out_at = to.at + (first - row0) * to.stride + low * to.step
                # While these panels are used, as many are prefetched that come about PANELS_AHEAD later.
                j, matrix, panel = i + max(1, PANELS_AHEAD // (high - low)), which, low
                if j > last:
                    j, matrix, panel = (j - last - 1) % (last + 1), next_which, next_low
                count, prefetch_at = end - first, panel_of(c, segments[j, SEGMENT_SLOT], layer, matrix, panel)
                shrunk = Place(b.s, s_at, b.s_stride, PANEL)
                out = Place(to.array, out_at, to.stride, to.step)
                expand(arena, at, ranks, low, high, prefetch_at, shrunk, column, count, out)

    @kernel
    def embed_rows(c):
        """x = the rows of the input embedding, with the adapters' parts. Ends with a barrier."""
        b, segments, width = c.buffers, c.rows.segments, c.shape.width
        low, high = share_of(c, len(c.rows.tokens))
        for r in range(low, high):
            embed(c.w.arena, c.w.matrices, c.w.embed, token_at(c.batch, c.rows, c.turn, r), b.x, r * width)
        for i in range(len(segments)):
            slot, arena = segments[i, SEGMENT_SLOT], c.adapters.arena
            a_at, b_at, ranks = c.adapters.embed[slot, 0], c.adapters.embed[slot, 1], c.adapters.embed[slot, 2]
            panels = (ranks + PANEL - 1) // PANEL
            first, end = max(low, segments[i, SEGMENT_FIRST]), min(high, segments[i, SEGMENT_END])
            for r in range(first, end if ranks > 0 else first):
                s_at = r * b.s_stride + segments[i, SEGMENT_COLUMN]
                token = token_at(c.batch, c.rows, c.turn, r)
                gather(arena, a_at, c.shape.vocabulary, panels, token, c.rows.scales[i], b.s, s_at)
                shrunk, out = Place(b.s, s_at, 0, PANEL), Place(b.x, r * width, 0, PANEL)
                expand(arena, b_at, ranks, 0, width // PANEL, b_at, shrunk, 0, 1, out)
        barrier(c.sync, c.threads)

    return shrink_all, expand_all, embed_rows
