"""The step, put together: one program for each set of formats."""

from functools import cache

from minilora_kernels.attention import make_attention
from minilora_kernels.batch import SAMPLING, all_ended, rounds_of, unpack
from minilora_kernels.held import hold
from minilora_kernels.jit import kernel
from minilora_kernels.linear import make_linear
from minilora_kernels.lora import make_lora
from minilora_kernels.pack import GROUP
from minilora_kernels.pages import make_write
from minilora_kernels.team import team_program

from ..adapters import DOWN_IN, DOWN_OUT, GATE_OUT, GATE_UP_IN, O_IN, O_OUT, Q_OUT, QKV_IN
from ..plan import DOWN, DOWN_BIAS, GATE_UP, INPUT_NORM, O_BIAS, POST_NORM, QKV, O
from .arrays import Context
from .attention import make_attend_all
from .head import choose_all, make_logits
from .lora import make_adapters
from .products import make_add_product, make_gate_up, make_product
from .projection import make_projection
from .rows import keep_wanted, norm_rows, quantize_attended


@cache
def make_step(formats: tuple[int, ...], kv_format: int, lora_format: int, head_unit: int):
    """The step for models whose matrices have these formats, with pages and adapters of these formats.

    head_unit: 16 or 64, of which the head size is a multiple. Everything else is a runtime value, so models that share
    all these share the machine code.
    """
    products, attention = make_linear.unit(formats), make_attention.unit(kv_format, head_unit)
    lora = make_lora.unit(lora_format)
    [linear], [attend, attend_part] = products.kernels, attention.kernels
    product = make_product(linear)
    write_key, write_value = make_write(kv_format)
    shrink_all, expand_all, embed_rows = make_adapters(lora_format, *lora.kernels)
    project_heads = make_projection(product, expand_all, write_key, write_value)
    attend_all = make_attend_all(attend, attend_part)
    add_product = make_add_product(product, shrink_all, expand_all)
    gate_up = make_gate_up(product, expand_all)
    logits = make_logits(product, shrink_all, expand_all)

    @kernel
    def prepare(c, layer, norm, matrix, which_in, which_out, columns_out):
        """Normalised rows for a product, and the adapters' share of them; returns as norm_rows does.

        which_out, columns_out: as shrink_all has them.
        """
        group = c.w.matrices[c.w.layers[layer, matrix], GROUP]
        x_row = norm_rows(c, c.w.layers[layer, norm], group)
        a, width = c.buffers.a, c.shape.width
        shrink_all(c, layer, which_in, width, group, a, x_row, x_row, which_out, columns_out)
        return x_row

    @kernel
    def prepare_heads(c, layer):
        """Normalised rows for q k v, as prepare has them."""
        return prepare(c, layer, INPUT_NORM, QKV, QKV_IN, Q_OUT, c.shape.heads * c.shape.head_dim)

    @kernel
    def run_layer(c, layer):
        """One layer of all rows."""
        w = c.w
        o, down = w.layers[layer, O], w.layers[layer, DOWN]
        x_row = prepare_heads(c, layer)
        project_heads(c, layer, x_row, 0)
        attend_all(c, layer)
        x_row = quantize_attended(c, w.matrices[o, GROUP])
        add_product(c, layer, o, w.layers[layer, O_BIAS], O_IN, O_OUT, c.buffers.a, x_row, 0)
        x_row = prepare(c, layer, POST_NORM, GATE_UP, GATE_UP_IN, GATE_OUT, c.shape.forward)
        gate_up(c, layer, x_row)
        add_product(c, layer, down, w.layers[layer, DOWN_BIAS], DOWN_IN, DOWN_OUT, c.buffers.b, 0, 0)

    @kernel
    def forward(c, wanted):
        """All layers and the head: writes the rows' pages, buffers.logits and the chosen tokens.

        wanted: c restricted to the rows whose logits are wanted; for the others the last layer computes keys and values
        only.
        """
        last = c.shape.layers - 1
        embed_rows(c)
        for layer in range(last):
            run_layer(c, layer)
        if len(wanted.rows.tokens) < len(c.rows.tokens):
            project_heads(c, last, prepare_heads(c, last), c.shape.heads)
            keep_wanted(c)
        if len(wanted.rows.tokens) > 0:
            run_layer(wanted, last)
            logits(wanted)
            choose_all(wanted)

    @kernel
    def step(thread, threads, sync, packed, fixed):
        """A forward pass of the batch's rows, then further rounds, each fed with the tokens that the last one chose."""
        (batch, rows, out), (w, shape, kv, adapters, buffers) = unpack(packed), fixed
        turn, going = 0, True
        while going:
            c = Context(thread, threads, sync, turn, w, shape, kv, batch, rows, adapters, buffers)
            wanted = Context(thread, threads, sync, turn, w, shape, kv, batch, out, adapters, buffers)
            forward(hold(c), hold(wanted))
            turn += 1
            going = turn < rounds_of(batch) and not all_ended(batch, turn - 1)

    return team_program(step, (formats, kv_format, lora_format, head_unit), (products, attention, lora, SAMPLING))
