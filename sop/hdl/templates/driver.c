#include <stdint.h>
#include "@HEADER@"

struct sop_tensor {
    uint32_t mode;               /* position of its format among those of the hardware */
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

/* Once after reset: 0 if this driver fits the hardware. */
int sop_init(volatile uint32_t *base)
{
    uint32_t major = (sop_read(base, SOP_VERSION) & SOP_VERSION_MAJOR_MASK)
                     >> SOP_VERSION_MAJOR_SHIFT;
    if (sop_read(base, SOP_ID) != SOP_ID_EXPECTED || major != SOP_VERSION_MAJOR_EXPECTED)
        return -1;
    sop_write(base, SOP_ERRORS, 0xffffffffu);
    sop_write(base, SOP_IRQ_STATUS, 0xffffffffu);
    sop_write(base, SOP_ERROR_ENABLE, 0xffffffffu);
    sop_write(base, SOP_IRQ_ENABLE, SOP_IRQ_ENABLE_DONE_MASK | SOP_IRQ_ENABLE_ERROR_MASK);
    return 0;
}

/* Describe and start a tensor, also while the one before it runs. Its packets may be under way
 * already or follow. -1: not ready for another one yet, nothing was changed. */
int sop_start(volatile uint32_t *base, const struct sop_tensor *tensor)
{
    const uint32_t ready = SOP_STATUS_START_READY_MASK | SOP_STATUS_LUT_READY_MASK;
    uint32_t lut, entry, byte;

    if ((sop_read(base, SOP_STATUS) & ready) != ready)
        return -1;
    for (lut = 0; lut < tensor->luts_count; lut++) {
        const uint8_t *codes = tensor->luts + lut * tensor->lut_entries;
        for (entry = 0; entry < tensor->lut_entries; entry += 4) {
            uint32_t word = 0;
            for (byte = 0; byte < 4; byte++)
                word |= (uint32_t)codes[entry + byte] << (8 * byte);
            sop_write(base, SOP_LUT_WINDOW + lut * SOP_LUT_STRIDE + entry, word);
        }
    }
    sop_write(base, SOP_MODE, tensor->mode);
    sop_write(base, SOP_LAYER_EXPONENT, (uint32_t)tensor->layer_exponent);
    sop_write(base, SOP_ROWS, tensor->rows);
    sop_write(base, SOP_COLUMNS, tensor->columns);
    sop_write(base, SOP_CORRECTIONS, tensor->corrections);
    sop_write(base, SOP_CONTROL, SOP_CONTROL_START_MASK);
    return 0;
}

/* Interrupt: gives the error flags, and tells whether a tensor's final beat has left. */
uint32_t sop_interrupt(volatile uint32_t *base, int *done)
{
    uint32_t errors = sop_read(base, SOP_ERRORS);

    *done = (sop_read(base, SOP_IRQ_STATUS) & SOP_IRQ_STATUS_DONE_MASK) != 0;
    if (*done)
        sop_write(base, SOP_IRQ_STATUS, SOP_IRQ_STATUS_DONE_MASK);
    sop_write(base, SOP_ERRORS, errors);
    return errors;
}

/* After a driver or DMA went wrong: forgets all tensors and everything on the streams. Reset the
 * DMA engines before the next tensor. */
void sop_reset(volatile uint32_t *base)
{
    sop_write(base, SOP_CONTROL, SOP_CONTROL_RESET_MASK);
}
