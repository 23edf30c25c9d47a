#include <stdint.h>
#include "@HEADER@"

#define SOP_NOT_READY (-1)    /* another tensor waits, or the decoder is stopped */
#define SOP_WRONG_FORMAT (-2) /* this hardware does not decode the tensor's format */

struct sop_tensor {
    uint32_t mode;               /* position of its format among those of the hardware */
    uint32_t format_id;          /* format_id of `sop inspect --json`, which has to be that of mode */
    int32_t layer_exponent;      /* f */
    uint32_t rows, columns;      /* without padding */
    uint32_t corrections;        /* entries; 0: send no packets for them */
    const uint8_t *luts;         /* .luts of the file: one byte an entry, LUT after LUT */
    uint32_t luts_count, lut_entries;
};

static void sop_write(volatile uint32_t *base, uint32_t offset, uint32_t value)
{
    base[offset / 4] = value;
}

static uint32_t sop_read(volatile uint32_t *base, uint32_t offset)
{
    return base[offset / 4];
}

/* Once after reset: 0 if this driver and its header fit the hardware. timeout: clocks without
 * progress that raise an error, more than any pause of the system; 0 for none. */
int sop_init(volatile uint32_t *base, uint32_t timeout)
{
    uint32_t major = (sop_read(base, SOP_VERSION) & SOP_VERSION_MAJOR_MASK)
                     >> SOP_VERSION_MAJOR_SHIFT;
    if (sop_read(base, SOP_ID) != SOP_ID_EXPECTED || major != SOP_VERSION_MAJOR_EXPECTED)
        return -1;
    if (sop_read(base, SOP_BUILD_ID) != SOP_BUILD_ID_EXPECTED)
        return -1; /* other formats, number of lanes or output than the header says */
    sop_write(base, SOP_TIMEOUT, timeout);
    sop_write(base, SOP_ERRORS, 0xffffffffu);
    sop_write(base, SOP_IRQ_STATUS, 0xffffffffu);
    sop_write(base, SOP_ERROR_ENABLE, 0xffffffffu);
    sop_write(base, SOP_IRQ_ENABLE, SOP_IRQ_ENABLE_DONE_MASK | SOP_IRQ_ENABLE_ERROR_MASK);
    return 0;
}

/* Describe and start a tensor, also while the one before it runs. Its packets may be under way
 * already or follow. Else SOP_NOT_READY or SOP_WRONG_FORMAT: nothing was started. */
int sop_start(volatile uint32_t *base, const struct sop_tensor *tensor)
{
    const uint32_t ready = SOP_STATUS_START_READY_MASK | SOP_STATUS_LUT_READY_MASK;
    uint32_t lut, entry, byte;

    if ((sop_read(base, SOP_STATUS) & ready) != ready)
        return SOP_NOT_READY;
    sop_write(base, SOP_MODE, tensor->mode);
    if (sop_read(base, SOP_FORMAT_ID) != tensor->format_id)
        return SOP_WRONG_FORMAT;
    for (lut = 0; lut < tensor->luts_count; lut++) {
        const uint8_t *codes = tensor->luts + lut * tensor->lut_entries;
        for (entry = 0; entry < tensor->lut_entries; entry += 4) {
            uint32_t word = 0;
            for (byte = 0; byte < 4; byte++)
                word |= (uint32_t)codes[entry + byte] << (8 * byte);
            sop_write(base, SOP_LUT_WINDOW + lut * SOP_LUT_STRIDE + entry, word);
        }
    }
    sop_write(base, SOP_LAYER_EXPONENT, (uint32_t)tensor->layer_exponent);
    sop_write(base, SOP_ROWS, tensor->rows);
    sop_write(base, SOP_COLUMNS, tensor->columns);
    sop_write(base, SOP_CORRECTIONS, tensor->corrections);
    sop_write(base, SOP_CONTROL, SOP_CONTROL_START_MASK);
    return 0;
}

/* Interrupt: gives the error flags, and in *over how many tensors are over since the last call,
 * which may be none or several: IRQ_STATUS.done is one bit for all. *counted keeps TENSORS; it
 * starts as what that register reads. */
uint32_t sop_interrupt(volatile uint32_t *base, uint32_t *counted, uint32_t *over)
{
    uint32_t errors = sop_read(base, SOP_ERRORS), tensors;

    sop_write(base, SOP_ERRORS, errors);
    /* Cleared before it is counted: a tensor that is over in between asks again. */
    sop_write(base, SOP_IRQ_STATUS, SOP_IRQ_STATUS_DONE_MASK);
    tensors = sop_read(base, SOP_TENSORS);
    *over = tensors - *counted;
    *counted = tensors;
    return errors;
}

/* To give up what is under way, as after a timeout, in this order:
 * 1. sop_stop: from now on the decoder takes and drops all that is sent, and ends the packet of
 *    values, if one has begun, with a beat without values;
 * 2. wait until sop_stopped, and until the DMA engines that send are idle, or reset them;
 * 3. sop_reset: tensors and LUTs are forgotten, and START is taken again. */
void sop_stop(volatile uint32_t *base)
{
    sop_write(base, SOP_CONTROL, SOP_CONTROL_STOP_MASK);
}

int sop_stopped(volatile uint32_t *base)
{
    return (sop_read(base, SOP_STATUS) & SOP_STATUS_STOPPED_MASK) != 0;
}

/* Never while an engine still sends: the rest of its packet would be taken for the next tensor's.
 * Without sop_stop before it, the packet of values breaks off, which AXI4-Stream forbids: reset
 * what receives it too. */
void sop_reset(volatile uint32_t *base)
{
    sop_write(base, SOP_CONTROL, SOP_CONTROL_RESET_MASK);
}
