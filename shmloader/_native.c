/* _native.c - the binding of the core; the only file with Python.h.
 *
 * Glue: it checks arguments, gives up the GIL, calls the core and turns a status into an exception of
 * shmloader.errors. What a caller handles as a matter of course (exists, full, extend, not found, stale)
 * comes back as a negative int instead.
 *
 * One long file, in four parts (Mapping and View, Segment, BatchRing, the module): what is shared is small, and a
 * second file with Python.h would be a second place for the core's independence of Python to end.
 *
 * Lifetimes: a View keeps its Mapping, so memory is unmapped only when the last array or tensor over it is gone, and
 * its guard: the Pins that keep a record in transit where it is.
 * In a forked child, and while the interpreter exits, deallocation does nothing.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "native/layout.h"
#include "native/shml.h"

static PyObject *errors_module;
static int exiting; /* set by atexit: the interpreter is being torn down */

/* ------------------------------------------------ errors ----------------------------------------------- */

static PyObject *raise_status(int status, const char *what)
{
    static const struct {
        int status;
        const char *type, *text;
    } table[] = {
        {SHML_E_INVAL, NULL, "an argument is out of its range"},
        {SHML_E_POISONED, "PoisonedError",
         "the shared state is damaged (a process died in a way that cannot be "
         "repaired, or memory was overwritten); build the dataset again"},
        {SHML_E_LAYOUT, "RingError", "not a segment of this version of shmloader, or not yet complete"},
        {SHML_E_TIMEOUT, "RingError", "the mutex was not had in 30 s: its holder is stopped or frozen"},
        {SHML_E_NAMESPACE, "RingError", "the segment was made in another PID namespace"},
        {SHML_E_CORRUPT, "RingError", "a record is not what its header says"},
        {SHML_E_MEMORY, "MemoryLimitError", "not enough memory; set SHMLOADER_RING_BYTES lower"},
        {SHML_E_FULL, "RingError", "no room"},
        {SHML_E_TOOBIG, "RecordTooLargeError", "larger than the ring"},
        {SHML_E_LEFT, "ClosedError", "the dataset was closed"},
        {SHML_E_STALE, "StaleTokenError", "the slot was given to another batch"},
    };
    if (status == SHML_E_SYS)
        return PyErr_SetFromErrno(PyExc_OSError);
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        if (table[i].status != status)
            continue;
        PyObject *type =
            table[i].type == NULL ? Py_NewRef(PyExc_ValueError) : PyObject_GetAttrString(errors_module, table[i].type);
        if (type != NULL) {
            PyErr_Format(type, "%s: %s", what, table[i].text);
            Py_DECREF(type);
        }
        return NULL;
    }
    PyErr_Format(PyExc_RuntimeError, "%s: status %d", what, status);
    return NULL;
}

/* The same for a call on a segment: a mutex that was not had is reported with its holder. */
static PyObject *raise_on(const shml_seg_t *seg, int status, const char *what)
{
    if (status != SHML_E_TIMEOUT)
        return raise_status(status, what);
    PyObject *type = PyObject_GetAttrString(errors_module, "RingError");
    if (type != NULL) {
        PyErr_Format(
            type,
            "%s: the mutex of this set was not had in %d s: thread %d holds it and does not go on (stopped by a "
            "signal, a debugger or the freezer?). Let it go on or end it.",
            what, (int)(SHML_LOCK_TIMEOUT_MS / 1000), (int)shml_mutex_holder(seg->control));
        Py_DECREF(type);
    }
    return NULL;
}

/* A status that the caller handles itself, as an int; others raise. */
static PyObject *status_or_raise(const shml_seg_t *seg, int status, const char *what)
{
    if (status >= 0 || status == SHML_E_NOTFOUND || status == SHML_E_EXISTS || status == SHML_E_FULL ||
        status == SHML_E_EXTEND || status == SHML_E_STALE || status == SHML_E_TOOBIG || status == SHML_E_MEMORY ||
        status == SHML_E_CLIENTS)
        return PyLong_FromLong(status);
    return seg == NULL ? raise_status(status, what) : raise_on(seg, status, what);
}

/* ------------------------------------------------ Mapping ---------------------------------------------- */

typedef struct {
    PyObject_HEAD uint8_t *at;
    uint64_t num_bytes;
    uint64_t forks;
    int writable, is_private; /* private: of malloc, so a forked child has a copy of its own */
} Mapping;

static PyTypeObject *mapping_type, *view_type, *pins_type, *segment_type, *batch_type;

static int in_home(const Mapping *m) { return m->is_private || m->forks == shml_forks(); }

static PyObject *mapping_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"fd", "num_bytes", "writable", "name", NULL};
    int fd, writable;
    unsigned long long num_bytes;
    const char *name;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iKps", names, &fd, &num_bytes, &writable, &name))
        return NULL;
    Mapping *self = (Mapping *)PyType_GenericAlloc(type, 0);
    if (self == NULL)
        return NULL;
    self->forks = shml_forks();
    self->num_bytes = num_bytes;
    self->writable = writable;
    self->is_private = fd == -1;
    void *at = NULL;
    Py_BEGIN_ALLOW_THREADS if (self->is_private) errno = posix_memalign(&at, SHML_ALIGN, num_bytes > 0 ? num_bytes : 1);
    else at = shml_map(fd, num_bytes, writable, name);
    Py_END_ALLOW_THREADS self->at = at;
    if (at == NULL) {
        PyErr_SetFromErrno(PyExc_OSError);
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void mapping_dealloc(Mapping *self)
{
    if (self->is_private)
        free(self->at);
    else if (self->at != NULL && in_home(self) && !exiting)
        shml_unmap(self->at, self->num_bytes);
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    PyObject_Free(self);
    Py_DECREF(type);
}

typedef struct {
    PyObject_HEAD PyObject *mapping, *guard;
    uint8_t *at;
    Py_ssize_t num_bytes;
    int readonly;
} View;

static PyObject *mapping_view(Mapping *self, PyObject *args)
{
    unsigned long long offset, num_bytes;
    PyObject *guard = Py_None;
    int readonly = 0;
    if (!PyArg_ParseTuple(args, "KK|Op", &offset, &num_bytes, &guard, &readonly))
        return NULL;
    if (offset > self->num_bytes || num_bytes > self->num_bytes - offset) {
        PyErr_SetString(PyExc_ValueError, "the view lies outside of the mapping");
        return NULL;
    }
    View *view = (View *)PyType_GenericAlloc(view_type, 0);
    if (view == NULL)
        return NULL;
    view->mapping = Py_NewRef((PyObject *)self);
    view->guard = Py_NewRef(guard);
    view->at = self->at + offset;
    view->num_bytes = (Py_ssize_t)num_bytes;
    view->readonly = readonly;
    return (PyObject *)view;
}

static PyObject *mapping_holds(Mapping *self, PyObject *arg)
{
    unsigned long long address = PyLong_AsUnsignedLongLong(arg);
    if (address == (unsigned long long)-1 && PyErr_Occurred())
        return NULL;
    return PyBool_FromLong(address - (uintptr_t)self->at < self->num_bytes);
}

static PyObject *mapping_get_is_home(Mapping *self, void *closure)
{
    (void)closure;
    return PyBool_FromLong(in_home(self));
}
static PyObject *mapping_get_num_bytes(Mapping *self, void *closure)
{
    (void)closure;
    return PyLong_FromUnsignedLongLong(self->num_bytes);
}

static PyMethodDef mapping_methods[] = {
    {"view", (PyCFunction)mapping_view, METH_VARARGS,
     "view(offset, num_bytes, guard=None, readonly=False): an exporter of these bytes that keeps the mapping and guard."},
    {"holds", (PyCFunction)mapping_holds, METH_O, "holds(address): whether it lies in the mapping."},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef mapping_getset[] = {
    {"is_home", (getter)mapping_get_is_home, NULL, "False in a child that forked after it was made.", NULL},
    {"num_bytes", (getter)mapping_get_num_bytes, NULL, "Its size.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot mapping_slots[] = {
    {Py_tp_new, mapping_new},
    {Py_tp_dealloc, mapping_dealloc},
    {Py_tp_methods, mapping_methods},
    {Py_tp_getset, mapping_getset},
    {Py_tp_doc, "Mapping(fd, num_bytes, writable, name): memory of `fd` (-1: of this process alone); unmapped with its "
                "last view."},
    {0, NULL},
};
static PyType_Spec mapping_spec = {"shmloader._native.Mapping", sizeof(Mapping), 0, Py_TPFLAGS_DEFAULT, mapping_slots};

/* ------------------------------------------------ View ------------------------------------------------- */

static void view_dealloc(View *self)
{
    Py_XDECREF(self->guard);
    Py_XDECREF(self->mapping);
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    PyObject_Free(self);
    Py_DECREF(type);
}

static int view_getbuffer(PyObject *object, Py_buffer *buffer, int flags)
{
    View *self = (View *)object;
    return PyBuffer_FillInfo(buffer, object, self->at, self->num_bytes, self->readonly, flags);
}

static PyType_Slot view_slots[] = {
    {Py_tp_dealloc, view_dealloc},
    {Py_bf_getbuffer, view_getbuffer},
    {Py_tp_doc, "Bytes of a mapping, by the buffer protocol; made by Mapping.view."},
    {0, NULL},
};
static PyType_Spec view_spec = {"shmloader._native.View", sizeof(View), 0,
                                Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, view_slots};

/* ------------------------------------------------ Segment ---------------------------------------------- */

typedef struct {
    PyObject_HEAD Mapping *control, *ring;
    pthread_mutex_t pin_lock;
    shml_seg_t seg;
} Segment;

static PyObject *segment_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"control", "ring", "lock_fd", "boot_id", "pid_namespace", NULL};
    PyObject *control, *ring;
    int lock_fd;
    Py_buffer boot_id;
    unsigned long long pid_namespace;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!O!iy*K", names, mapping_type, &control, mapping_type, &ring,
                                     &lock_fd, &boot_id, &pid_namespace))
        return NULL;
    Mapping *c = (Mapping *)control, *r = (Mapping *)ring;
    int status = boot_id.len != 16 || !c->writable
                     ? SHML_E_INVAL
                     : shml_control_check(c->at, c->num_bytes, boot_id.buf, pid_namespace);
    PyBuffer_Release(&boot_id);
    if (status == SHML_OK && ((shml_control_t *)c->at)->ring_bytes > r->num_bytes)
        status = SHML_E_LAYOUT;
    if (status != SHML_OK)
        return raise_status(status, "attach");
    Segment *self = (Segment *)PyType_GenericAlloc(type, 0);
    if (self == NULL)
        return NULL;
    self->control = (Mapping *)Py_NewRef(control);
    self->ring = (Mapping *)Py_NewRef(ring);
    pthread_mutex_init(&self->pin_lock, NULL);
    /* Of zero pages: only the counts of records that are pinned take memory. */
    uint16_t *pin_counts = calloc(((shml_control_t *)c->at)->num_descs, sizeof *pin_counts);
    self->seg = (shml_seg_t){.control = (shml_control_t *)c->at,
                             .ring = r->at,
                             .ring_bytes = r->num_bytes,
                             .lock_fd = lock_fd,
                             .pin_counts = pin_counts,
                             .pin_lock = &self->pin_lock,
                             .self = -1,
                             .env = &shml_env_linux};
    if (pin_counts == NULL) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void segment_dealloc(Segment *self)
{
    free(self->seg.pin_counts);
    Py_XDECREF((PyObject *)self->control);
    Py_XDECREF((PyObject *)self->ring);
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    PyObject_Free(self);
    Py_DECREF(type);
}

/* Raises in a forked child, where the mapping is gone. */
static int usable(const Segment *self)
{
    if (in_home(self->control))
        return 1;
    PyErr_SetString(PyExc_RuntimeError, "this segment was attached before fork(); attach again in the child");
    return 0;
}

/* ------------------------------------------------ Pins ------------------------------------------------- */

typedef struct {
    PyObject_HEAD Segment *segment; /* keeps the mappings */
    uint32_t n;
    shml_ref_t *refs; /* those of a look-up, pinned or not */
} Pins;

static int is_pinned(const shml_ref_t *ref) { return ref->status <= SHML_REF_ERROR && ref->chunk == 1; }

/* Pins of these refs, which now has the care of them: None if none is pinned, NULL with an exception set. */
static PyObject *pins_of(Segment *segment, const shml_ref_t *refs, uint32_t n)
{
    uint32_t first = 0;
    while (first < n && !is_pinned(&refs[first]))
        first++;
    if (first == n)
        return Py_NewRef(Py_None);
    Pins *pins = (Pins *)PyType_GenericAlloc(pins_type, 0);
    if (pins == NULL)
        return NULL;
    pins->refs = malloc(n * sizeof *refs);
    if (pins->refs == NULL) {
        Py_DECREF(pins);
        return PyErr_NoMemory();
    }
    memcpy(pins->refs, refs, n * sizeof *refs);
    pins->n = n;
    pins->segment = (Segment *)Py_NewRef((PyObject *)segment);
    return (PyObject *)pins;
}

static void pins_dealloc(Pins *self)
{
    /* Not in a child: they are the parent's. Not at exit either: whoever reaps this process gives them back. */
    if (self->segment != NULL && in_home(self->segment->control) && !exiting)
        shml_unpin(&self->segment->seg, self->refs, self->n);
    Py_XDECREF((PyObject *)self->segment);
    free(self->refs);
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    PyObject_Free(self);
    Py_DECREF(type);
}

static PyObject *pins_one(Pins *self, PyObject *arg)
{
    long i = PyLong_AsLong(arg);
    if (i == -1 && PyErr_Occurred())
        return NULL;
    if (i < 0 || i >= (long)self->n) {
        PyErr_SetString(PyExc_IndexError, "no such record in this look-up");
        return NULL;
    }
    const shml_ref_t *ref = &self->refs[i];
    if (!is_pinned(ref) || !in_home(self->segment->control))
        return Py_NewRef(Py_None);
    int status = shml_pin_again(&self->segment->seg, ref);
    if (status != SHML_OK)
        return raise_status(status, "pin");
    PyObject *one = pins_of(self->segment, ref, 1);
    if (one == NULL)
        shml_unpin(&self->segment->seg, ref, 1);
    return one;
}

static PyMethodDef pins_methods[] = {
    {"one", (PyCFunction)pins_one, METH_O, "one(i): a pin more of the i-th record alone; None: it needs none."},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot pins_slots[] = {
    {Py_tp_dealloc, pins_dealloc},
    {Py_tp_methods, pins_methods},
    {Py_tp_doc, "What a look-up pinned; given back when it dies."},
    {0, NULL},
};
static PyType_Spec pins_spec = {"shmloader._native.Pins", sizeof(Pins), 0,
                                Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, pins_slots};

/* ------------------------------------------------ Segment, its methods --------------------------------- */

#define CALL(expression)                                                                                               \
    int status;                                                                                                        \
    Py_BEGIN_ALLOW_THREADS status = (expression);                                                                      \
    Py_END_ALLOW_THREADS

static PyObject *segment_register(Segment *self, PyObject *args)
{
    unsigned int role, owner_gen;
    int owner;
    if (!PyArg_ParseTuple(args, "IiI", &role, &owner, &owner_gen) || !usable(self))
        return NULL;
    CALL(shml_client_register(&self->seg, role, owner, owner_gen));
    if (status != SHML_OK)
        return status_or_raise(&self->seg, status, "register");
    return Py_BuildValue("(iI)", self->seg.self, shml_client_gen(&self->seg, self->seg.self));
}

static PyObject *segment_unregister(Segment *self, PyObject *unused)
{
    (void)unused;
    if (in_home(self->control)) {
        Py_BEGIN_ALLOW_THREADS shml_client_unregister(&self->seg);
        Py_END_ALLOW_THREADS
            /* The files are closed next, and their numbers are other files' when the last pin is given back. */
            self->seg.lock_fd = -1;
    }
    Py_RETURN_NONE;
}

static PyObject *segment_reap(Segment *self, PyObject *args)
{
    int now;
    if (!PyArg_ParseTuple(args, "p", &now) || !usable(self))
        return NULL;
    CALL(shml_reap(&self->seg, now));
    return status < 0 ? raise_on(&self->seg, status, "reap") : PyLong_FromLong(status);
}

static PyObject *segment_count(Segment *self, PyObject *args)
{
    unsigned int role;
    if (!PyArg_ParseTuple(args, "I", &role) || !usable(self))
        return NULL;
    return PyLong_FromUnsignedLong(shml_count_clients(&self->seg, role));
}

/* An array of u64 or u32 from a buffer; 0 with an exception set. */
static int parse_array(PyObject *object, Py_buffer *buffer, Py_ssize_t item_bytes, uint32_t *n)
{
    if (PyObject_GetBuffer(object, buffer, PyBUF_SIMPLE) != 0)
        return 0;
    if (buffer->len % item_bytes != 0 || buffer->len / item_bytes > UINT32_MAX) {
        PyBuffer_Release(buffer);
        PyErr_SetString(PyExc_ValueError, "an array has a wrong size");
        return 0;
    }
    *n = (uint32_t)(buffer->len / item_bytes);
    return 1;
}

static PyObject *segment_claim_rows(Segment *self, PyObject *object)
{
    Py_buffer ids;
    uint32_t n;
    if (!usable(self) || !parse_array(object, &ids, 8, &n))
        return NULL;
    PyObject *got = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)n);
    if (got != NULL) {
        uint8_t *out = (uint8_t *)PyBytes_AsString(got);
        CALL(shml_claim_rows(&self->seg, ids.buf, n, out));
        /* FULL: there is no descriptor for the rest now. It was not had, and is asked for again. */
        if (status < 0 && status != SHML_E_FULL) {
            Py_CLEAR(got);
            raise_on(&self->seg, status, "claim_rows");
        }
    }
    PyBuffer_Release(&ids);
    return got;
}

static PyObject *segment_unclaim_rows(Segment *self, PyObject *object)
{
    Py_buffer ids;
    uint32_t n;
    if (!usable(self) || !parse_array(object, &ids, 8, &n))
        return NULL;
    CALL(shml_unclaim_rows(&self->seg, ids.buf, n));
    PyBuffer_Release(&ids);
    return status < 0 ? raise_on(&self->seg, status, "unclaim_rows") : Py_NewRef(Py_None);
}

/* (order, gen, until) or None. */
static int parse_stamp(PyObject *object, shml_stamp_t *stamp)
{
    unsigned long long until;
    *stamp = (shml_stamp_t){.order = SHML_NO_ORDER};
    if (object == Py_None)
        return 1;
    if (!PyTuple_Check(object)) {
        PyErr_SetString(PyExc_TypeError, "a stamp is (order, generation, until)");
        return 0;
    }
    if (!PyArg_ParseTuple(object, "IIK", &stamp->order, &stamp->gen, &until))
        return 0;
    stamp->until = until;
    return 1;
}

static PyObject *segment_reserve(Segment *self, PyObject *args)
{
    unsigned long long id, num_bytes;
    PyObject *object;
    int urgent;
    shml_stamp_t stamp;
    if (!PyArg_ParseTuple(args, "KKOp", &id, &num_bytes, &object, &urgent) || !parse_stamp(object, &stamp) ||
        !usable(self))
        return NULL;
    shml_ticket_t ticket;
    CALL(shml_reserve(&self->seg, id, num_bytes, &stamp, urgent, &ticket));
    if (status == SHML_E_EXTEND)
        return Py_BuildValue("(iIK)", status, ticket.desc, ticket.offset + ticket.num_bytes);
    if (status != SHML_OK)
        return status_or_raise(&self->seg, status, "reserve");
    return Py_BuildValue("(KKII)", ticket.offset, ticket.num_bytes, ticket.desc, ticket.gen);
}

static int parse_ticket(PyObject *tuple, shml_ticket_t *ticket)
{
    unsigned long long offset, num_bytes;
    if (!PyArg_ParseTuple(tuple, "KKII", &offset, &num_bytes, &ticket->desc, &ticket->gen))
        return 0;
    ticket->offset = offset;
    ticket->num_bytes = num_bytes;
    return 1;
}

static PyObject *segment_commit(Segment *self, PyObject *args)
{
    PyObject *tuple;
    unsigned int record_status;
    shml_ticket_t ticket;
    if (!PyArg_ParseTuple(args, "O!I", &PyTuple_Type, &tuple, &record_status) || !parse_ticket(tuple, &ticket) ||
        !usable(self))
        return NULL;
    CALL(shml_commit(&self->seg, &ticket, record_status));
    return status_or_raise(&self->seg, status, "commit");
}

static PyObject *segment_abort(Segment *self, PyObject *tuple)
{
    shml_ticket_t ticket;
    if (!parse_ticket(tuple, &ticket) || !usable(self))
        return NULL;
    CALL(shml_abort(&self->seg, &ticket));
    return status_or_raise(&self->seg, status, "abort");
}

/* (order, gen, begin, end) or None. */
static int parse_place(PyObject *object, shml_place_t *place)
{
    unsigned long long begin, end;
    if (!PyTuple_Check(object)) {
        PyErr_SetString(PyExc_TypeError, "a place is (order, generation, begin, end)");
        return 0;
    }
    if (!PyArg_ParseTuple(object, "IIKK", &place->order, &place->gen, &begin, &end))
        return 0;
    place->begin = begin;
    place->end = end;
    return 1;
}

static PyObject *segment_get_many(Segment *self, PyObject *args)
{
    PyObject *object, *place_object, *result = NULL, *refs, *pins = NULL;
    Py_buffer ids;
    int flags;
    uint32_t n;
    shml_place_t place;
    shml_found_t found = {0};
    if (!PyArg_ParseTuple(args, "OiO", &object, &flags, &place_object) ||
        (place_object != Py_None && !parse_place(place_object, &place)) || !usable(self) ||
        !parse_array(object, &ids, 8, &n))
        return NULL;
    refs = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)n * (Py_ssize_t)sizeof(shml_ref_t));
    if (refs != NULL) {
        shml_ref_t *out = (shml_ref_t *)PyBytes_AsString(refs);
        CALL(shml_get_many(&self->seg, ids.buf, n, flags, place_object == Py_None ? NULL : &place, out, &found));
        if (status != SHML_OK)
            raise_on(&self->seg, status, "get_many");
        else if ((pins = pins_of(self, out, n)) != NULL)
            result = Py_BuildValue("(OIOO)", refs, found.num_missing, pins, found.over_quota ? Py_True : Py_False);
        else
            shml_unpin(&self->seg, out, n);
    }
    Py_XDECREF(pins);
    Py_XDECREF(refs);
    PyBuffer_Release(&ids);
    return result;
}

/* Grows when the records that readers wait with are in the way of others. Read without the mutex: a hint. */
static PyObject *segment_starved(Segment *self, PyObject *unused)
{
    (void)unused;
    return usable(self) ? PyLong_FromUnsignedLongLong(self->seg.control->num_starved) : NULL;
}

static PyObject *segment_pinned_bytes(Segment *self, PyObject *unused)
{
    (void)unused;
    return usable(self) ? PyLong_FromUnsignedLongLong(self->seg.pinned_bytes) : NULL;
}

static PyObject *segment_wake_word(Segment *self, PyObject *unused)
{
    (void)unused;
    return usable(self) ? PyLong_FromUnsignedLong(shml_wake_word(&self->seg)) : NULL;
}

static PyObject *segment_wait(Segment *self, PyObject *args)
{
    unsigned int seen, timeout_ms;
    if (!PyArg_ParseTuple(args, "II", &seen, &timeout_ms) || !usable(self))
        return NULL;
    Py_BEGIN_ALLOW_THREADS shml_wait(&self->seg, seen, timeout_ms);
    Py_END_ALLOW_THREADS if (PyErr_CheckSignals() != 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *segment_work_word(Segment *self, PyObject *unused)
{
    (void)unused;
    return usable(self) ? PyLong_FromUnsignedLong(shml_work_word(&self->seg)) : NULL;
}

static PyObject *segment_work_wait(Segment *self, PyObject *args)
{
    unsigned int seen, timeout_ms;
    if (!PyArg_ParseTuple(args, "II", &seen, &timeout_ms) || !usable(self))
        return NULL;
    Py_BEGIN_ALLOW_THREADS shml_work_wait(&self->seg, seen, timeout_ms);
    Py_END_ALLOW_THREADS if (PyErr_CheckSignals() != 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *segment_work_tell(Segment *self, PyObject *unused)
{
    (void)unused;
    if (!usable(self))
        return NULL;
    shml_work_tell(&self->seg);
    Py_RETURN_NONE;
}

static PyObject *segment_look(Segment *self, PyObject *args)
{
    PyObject *object, *stamp_object;
    Py_buffer ids;
    uint32_t n;
    shml_stamp_t stamp;
    if (!PyArg_ParseTuple(args, "OO", &object, &stamp_object) || !parse_stamp(stamp_object, &stamp) || !usable(self) ||
        !parse_array(object, &ids, 8, &n))
        return NULL;
    PyObject *rows = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)n);
    if (rows != NULL) {
        uint8_t *out = (uint8_t *)PyBytes_AsString(rows);
        CALL(shml_look(&self->seg, ids.buf, n, stamp_object == Py_None ? NULL : &stamp, out));
        if (status < 0) {
            Py_CLEAR(rows);
            raise_on(&self->seg, status, "look");
        }
    }
    PyBuffer_Release(&ids);
    return rows;
}

#define MAX_WANTED 4096
static PyObject *segment_wanted(Segment *self, PyObject *args)
{
    unsigned int most;
    uint64_t ids[MAX_WANTED];
    if (!PyArg_ParseTuple(args, "I", &most) || !usable(self))
        return NULL;
    CALL(shml_wanted(&self->seg, ids, most < MAX_WANTED ? most : MAX_WANTED));
    if (status < 0)
        return raise_on(&self->seg, status, "wanted");
    PyObject *list = PyList_New(status);
    for (int i = 0; list != NULL && i < status; i++) {
        PyObject *id = PyLong_FromUnsignedLongLong(ids[i]);
        if (id == NULL || PyList_SetItem(list, i, id) != 0)
            Py_CLEAR(list);
    }
    return list;
}

static PyObject *segment_chunk_look(Segment *self, PyObject *object)
{
    Py_buffer chunks;
    uint32_t n;
    if (!usable(self) || !parse_array(object, &chunks, 4, &n))
        return NULL;
    PyObject *states = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)n);
    if (states != NULL) {
        uint8_t *out = (uint8_t *)PyBytes_AsString(states);
        CALL(shml_chunk_look(&self->seg, chunks.buf, n, out));
        if (status < 0) {
            Py_CLEAR(states);
            raise_on(&self->seg, status, "chunk_look");
        }
    }
    PyBuffer_Release(&chunks);
    return states;
}

static PyObject *segment_chunk_claim(Segment *self, PyObject *args)
{
    unsigned int chunk;
    if (!PyArg_ParseTuple(args, "I", &chunk) || !usable(self))
        return NULL;
    CALL(shml_chunk_claim(&self->seg, chunk));
    return status_or_raise(&self->seg, status, "chunk_claim");
}

static PyObject *segment_chunk_claim_open(Segment *self, PyObject *args)
{
    unsigned int slot, gen;
    unsigned long long number;
    uint32_t chunk;
    if (!PyArg_ParseTuple(args, "IIK", &slot, &gen, &number) || !usable(self))
        return NULL;
    CALL(shml_chunk_claim_open(&self->seg, slot, gen, number, &chunk));
    PyObject *told = status_or_raise(&self->seg, status, "chunk_claim_open");
    if (told == NULL)
        return NULL;
    Py_DECREF(told);
    return Py_BuildValue("(Ii)", chunk, status);
}

static PyObject *segment_chunk_first(Segment *self, PyObject *args)
{
    unsigned int chunk;
    uint64_t first_row;
    if (!PyArg_ParseTuple(args, "I", &chunk) || !usable(self))
        return NULL;
    CALL(shml_chunk_first(&self->seg, chunk, &first_row));
    if (status != SHML_OK)
        return raise_on(&self->seg, status, "chunk_first");
    return first_row == UINT64_MAX ? Py_NewRef(Py_None) : PyLong_FromUnsignedLongLong(first_row);
}

static PyObject *segment_row_chunks(Segment *self, PyObject *object)
{
    Py_buffer ids;
    uint32_t n;
    if (!usable(self) || !parse_array(object, &ids, 8, &n))
        return NULL;
    PyObject *chunks = PyBytes_FromStringAndSize(NULL, 4 * (Py_ssize_t)n);
    if (chunks != NULL) {
        void *out = PyBytes_AsString(chunks); /* aligned for a uint32_t, as all that is allocated */
        CALL(shml_row_chunks(&self->seg, ids.buf, n, out));
        if (status != SHML_OK) {
            Py_CLEAR(chunks);
            raise_on(&self->seg, status, "row_chunks");
        }
    }
    PyBuffer_Release(&ids);
    return chunks;
}

static PyObject *segment_chunk_end(Segment *self, PyObject *args)
{
    unsigned int chunk;
    int outcome;
    if (!PyArg_ParseTuple(args, "Ii", &chunk, &outcome) || !usable(self))
        return NULL;
    CALL(shml_chunk_end(&self->seg, chunk, outcome));
    return status_or_raise(&self->seg, status, "chunk_end");
}

static PyObject *segment_chunks_wanted(Segment *self, PyObject *args)
{
    unsigned int most;
    uint32_t chunks[MAX_WANTED], counts[MAX_WANTED];
    if (!PyArg_ParseTuple(args, "I", &most) || !usable(self))
        return NULL;
    CALL(shml_chunks_wanted(&self->seg, chunks, counts, most < MAX_WANTED ? most : MAX_WANTED));
    if (status < 0)
        return raise_on(&self->seg, status, "chunks_wanted");
    PyObject *list = PyList_New(status);
    for (int i = 0; list != NULL && i < status; i++) {
        PyObject *item = Py_BuildValue("(II)", chunks[i], counts[i]);
        if (item == NULL || PyList_SetItem(list, i, item) != 0)
            Py_CLEAR(list);
    }
    return list;
}

static PyObject *segment_raw_release(Segment *self, PyObject *args)
{
    int fd;
    if (!PyArg_ParseTuple(args, "i", &fd) || !usable(self))
        return NULL;
    CALL(shml_raw_release(&self->seg, fd));
    return status < 0 ? raise_on(&self->seg, status, "raw_release") : PyBool_FromLong(status);
}

static PyObject *segment_spill_reserve(Segment *self, PyObject *args)
{
    unsigned int chunk;
    unsigned long long num_bytes;
    uint64_t offset;
    if (!PyArg_ParseTuple(args, "IK", &chunk, &num_bytes) || !usable(self))
        return NULL;
    CALL(shml_spill_reserve(&self->seg, chunk, num_bytes, &offset));
    return status == SHML_OK ? PyLong_FromUnsignedLongLong(offset)
                             : status_or_raise(&self->seg, status, "spill_reserve");
}

static PyObject *segment_spill_commit(Segment *self, PyObject *args)
{
    unsigned int chunk;
    unsigned long long offset, num_bytes;
    if (!PyArg_ParseTuple(args, "IKK", &chunk, &offset, &num_bytes) || !usable(self))
        return NULL;
    CALL(shml_spill_commit(&self->seg, chunk, offset, num_bytes));
    return status_or_raise(&self->seg, status, "spill_commit");
}

static PyObject *segment_spill_give_back(Segment *self, PyObject *args)
{
    int fd;
    unsigned long long offset, num_bytes;
    if (!PyArg_ParseTuple(args, "iKK", &fd, &offset, &num_bytes) || !usable(self))
        return NULL;
    CALL(shml_spill_give_back(&self->seg, fd, offset, num_bytes));
    return status == SHML_OK ? Py_NewRef(Py_None) : raise_on(&self->seg, status, "spill_give_back");
}

static PyObject *segment_spill_freeze(Segment *self, PyObject *unused)
{
    (void)unused;
    if (!usable(self))
        return NULL;
    CALL(shml_spill_freeze(&self->seg));
    return status < 0 ? raise_on(&self->seg, status, "spill_freeze") : PyBool_FromLong(status);
}

static PyObject *segment_spill_find(Segment *self, PyObject *args)
{
    unsigned int chunk;
    uint64_t offset, num_bytes;
    if (!PyArg_ParseTuple(args, "I", &chunk) || !usable(self))
        return NULL;
    int status = shml_spill_find(&self->seg, chunk, &offset, &num_bytes);
    if (status == SHML_E_NOTFOUND)
        Py_RETURN_NONE;
    return status == SHML_OK ? Py_BuildValue("(KK)", offset, num_bytes) : raise_on(&self->seg, status, "spill_find");
}

static PyObject *segment_count_fetched(Segment *self, PyObject *args)
{
    unsigned long long num_bytes;
    if (!PyArg_ParseTuple(args, "K", &num_bytes) || !usable(self))
        return NULL;
    shml_count_fetched(&self->seg, num_bytes);
    Py_RETURN_NONE;
}

static PyObject *segment_count_decoding(Segment *self, PyObject *args)
{
    unsigned long long ns;
    if (!PyArg_ParseTuple(args, "K", &ns) || !usable(self))
        return NULL;
    shml_count_decoding(&self->seg, ns);
    Py_RETURN_NONE;
}

static PyObject *segment_order_begin(Segment *self, PyObject *args)
{
    unsigned long long seed, epoch, num_positions;
    shml_order_info_t order = {0};
    int drop_last;
    if (!PyArg_ParseTuple(args, "KKKIIIp", &seed, &epoch, &num_positions, &order.kind, &order.rank, &order.world_size,
                          &drop_last) ||
        !usable(self))
        return NULL;
    order.seed = seed;
    order.epoch = epoch;
    order.num_positions = num_positions;
    order.drop_last = (uint32_t)drop_last;
    CALL(shml_order_begin(&self->seg, &order));
    return status == SHML_OK ? Py_BuildValue("(II)", order.slot, order.gen)
                             : status_or_raise(&self->seg, status, "order_begin");
}

static PyObject *segment_order_end(Segment *self, PyObject *args)
{
    unsigned int slot, gen;
    if (!PyArg_ParseTuple(args, "II", &slot, &gen) || !usable(self))
        return NULL;
    CALL(shml_order_end(&self->seg, slot, gen));
    return status_or_raise(&self->seg, status, "order_end");
}

static PyObject *segment_order_join(Segment *self, PyObject *args)
{
    unsigned long long key, seed, epoch, num_positions;
    shml_join_t join;
    shml_order_info_t order = {0};
    if (!PyArg_ParseTuple(args, "KIIiIKKKI", &key, &join.reader, &join.num_readers, &join.owner, &join.owner_gen, &seed,
                          &epoch, &num_positions, &order.kind) ||
        !usable(self))
        return NULL;
    join.key = key;
    order.seed = seed;
    order.epoch = epoch;
    order.num_positions = num_positions;
    order.world_size = 1;
    CALL(shml_order_join(&self->seg, &join, &order));
    if (status != SHML_OK)
        return status_or_raise(&self->seg, status, "order_join");
    return Py_BuildValue("(IIKKK)", order.slot, order.gen, order.num_positions, order.epoch, order.seed);
}

static PyObject *segment_order_leave(Segment *self, PyObject *args)
{
    unsigned int slot, gen;
    if (!PyArg_ParseTuple(args, "II", &slot, &gen) || !usable(self))
        return NULL;
    CALL(shml_order_leave(&self->seg, slot, gen));
    return status_or_raise(&self->seg, status, "order_leave");
}

static PyObject *segment_order_finish(Segment *self, PyObject *args)
{
    unsigned int slot, gen;
    unsigned long long num_positions;
    if (!PyArg_ParseTuple(args, "IIK", &slot, &gen, &num_positions) || !usable(self))
        return NULL;
    CALL(shml_order_finish(&self->seg, slot, gen, num_positions));
    return status_or_raise(&self->seg, status, "order_finish");
}

static PyObject *segment_orders(Segment *self, PyObject *unused)
{
    (void)unused;
    if (!usable(self))
        return NULL;
    shml_order_info_t orders[SHML_MAX_ORDERS];
    CALL(shml_orders(&self->seg, orders, SHML_MAX_ORDERS));
    if (status < 0)
        return raise_on(&self->seg, status, "orders");
    PyObject *list = PyList_New(status);
    for (int i = 0; list != NULL && i < status; i++) {
        const shml_order_info_t *o = &orders[i];
        PyObject *item = Py_BuildValue("(IIKKKIIIIIK)", o->slot, o->gen, o->seed, o->epoch, o->num_positions, o->kind,
                                       o->rank, o->world_size, o->drop_last, o->num_readers, o->low_water);
        if (item == NULL || PyList_SetItem(list, i, item) != 0)
            Py_CLEAR(list);
    }
    return list;
}

static PyObject *segment_num_orders(Segment *self, PyObject *unused)
{
    (void)unused;
    return usable(self) ? PyLong_FromUnsignedLong(shml_num_orders(&self->seg)) : NULL;
}

static PyObject *segment_touch(Segment *self, PyObject *unused)
{
    (void)unused;
    if (!usable(self))
        return NULL;
    shml_touch(&self->seg);
    Py_RETURN_NONE;
}

static PyObject *segment_back(Segment *self, PyObject *args)
{
    int fd;
    unsigned int region;
    unsigned long long need_end;
    if (!PyArg_ParseTuple(args, "iIK", &fd, &region, &need_end) || !usable(self))
        return NULL;
    shml_memory_t memory = {0};
    CALL(shml_ring_back(&self->seg, fd, region, need_end, &memory));
    if (status != SHML_OK && status != SHML_E_MEMORY)
        return raise_on(&self->seg, status, "back");
    return Py_BuildValue("(iKs)", status, memory.available_bytes, memory.limited_by);
}

static PyObject *segment_text_put(Segment *self, PyObject *args)
{
    unsigned int which;
    Py_buffer text;
    if (!PyArg_ParseTuple(args, "Iy*", &which, &text))
        return NULL;
    int status = SHML_E_INVAL;
    if (usable(self)) {
        Py_BEGIN_ALLOW_THREADS status = shml_text_put(&self->seg, which, text.buf, (uint32_t)text.len);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&text);
    return PyErr_Occurred() ? NULL : status_or_raise(&self->seg, status, "text_put");
}

static PyObject *segment_text_get(Segment *self, PyObject *args)
{
    unsigned int which;
    if (!PyArg_ParseTuple(args, "I", &which) || !usable(self))
        return NULL;
    char *text = PyMem_Malloc(SHML_TEXT_BYTES);
    if (text == NULL)
        return PyErr_NoMemory();
    int n = shml_text_get(&self->seg, which, text);
    PyObject *result = n == SHML_E_NOTFOUND ? Py_NewRef(Py_None)
                       : n < 0              ? raise_on(&self->seg, n, "text_get")
                                            : PyBytes_FromStringAndSize(text, n);
    PyMem_Free(text);
    return result;
}

static PyObject *segment_epoch(Segment *self, PyObject *args)
{
    PyObject *epoch = Py_None;
    if (!PyArg_ParseTuple(args, "|O", &epoch) || !usable(self))
        return NULL;
    if (epoch != Py_None) {
        unsigned long long value = PyLong_AsUnsignedLongLong(epoch);
        if (PyErr_Occurred())
            return NULL;
        shml_epoch_set(&self->seg, value);
    }
    return PyLong_FromUnsignedLongLong(shml_epoch_get(&self->seg));
}

static PyObject *segment_stats(Segment *self, PyObject *unused)
{
    (void)unused;
    if (!usable(self))
        return NULL;
    shml_stats_t s;
    CALL(shml_get_stats(&self->seg, &s));
    if (status != SHML_OK)
        return raise_on(&self->seg, status, "stats");
    const struct {
        const char *name;
        uint64_t value;
    } items[] = {
#define REGION(r)                                                                                                      \
    {#r "_bytes", s.r.bytes}, {#r "_backed_bytes", s.r.backed_bytes}, {#r "_used_bytes", s.r.used_bytes},              \
        {#r "_head_bytes", s.r.head_bytes}, {#r "_blocks", s.r.num_blocks}, {#r "_frozen", s.r.frozen}
#define ITEM(name) {#name, s.name}
        REGION(resident),     REGION(transit),       REGION(raw),         ITEM(num_records),
        ITEM(num_ready),      ITEM(num_errors),      ITEM(num_aside),     ITEM(num_reserved),
        ITEM(num_claimed),    ITEM(num_suspect),     ITEM(num_commits),   ITEM(commit_bytes),
        ITEM(num_reads),      ITEM(num_evicted),     ITEM(num_starved),   ITEM(fetched_bytes),
        ITEM(decoding_ns),    ITEM(num_fetched),     ITEM(progress),      ITEM(chunks_todo),
        ITEM(chunks_claimed), ITEM(chunks_done),     ITEM(chunks_broken), ITEM(num_owners),
        ITEM(num_workers),    ITEM(num_services),    ITEM(num_reaped),    ITEM(num_services_lost),
        ITEM(num_rebuilds),   ITEM(num_orders),      ITEM(spill_bytes),   ITEM(spill_used_bytes),
        ITEM(spill_frozen),   ITEM(num_guest_reads), ITEM(num_resident),  ITEM(most_resident),
        ITEM(num_transit),    ITEM(most_transit),
#undef ITEM
#undef REGION
    };
    PyObject *dict = PyDict_New();
    for (size_t i = 0; dict != NULL && i < sizeof items / sizeof *items; i++) {
        PyObject *value = PyLong_FromUnsignedLongLong(items[i].value);
        if (value == NULL || PyDict_SetItemString(dict, items[i].name, value) != 0)
            Py_CLEAR(dict);
        Py_XDECREF(value);
    }
    return dict;
}

static PyObject *segment_progress(Segment *self, PyObject *unused)
{
    (void)unused;
    return usable(self) ? PyLong_FromUnsignedLongLong(self->seg.control->progress) : NULL;
}

static PyObject *segment_mutex_holder(Segment *self, PyObject *unused)
{
    (void)unused;
    return usable(self) ? PyLong_FromLong(shml_mutex_holder(self->seg.control)) : NULL;
}

static PyObject *segment_clients(Segment *self, PyObject *unused)
{
    (void)unused;
    PyObject *list = usable(self) ? PyList_New(0) : NULL;
    for (uint32_t i = 0; list != NULL && i < SHML_MAX_CLIENTS; i++) {
        const shml_client_t *client = &shml_clients(self->seg.control)[i];
        if (client->state != SHML_CLIENT_ACTIVE)
            continue;
        PyObject *item = Py_BuildValue("(IiI)", i, client->pid, client->role);
        if (item == NULL || PyList_Append(list, item) != 0)
            Py_CLEAR(list);
        Py_XDECREF(item);
    }
    return list;
}

static PyObject *segment_check(Segment *self, PyObject *unused)
{
    (void)unused;
    if (!usable(self))
        return NULL;
    const char *what = "";
    CALL(shml_check(&self->seg, NULL, &what));
    if (status == SHML_E_CORRUPT)
        return PyUnicode_FromString(what);
    return status == SHML_OK ? Py_NewRef(Py_None) : raise_on(&self->seg, status, "check");
}

/* refs: bytes of shml_ref_t. */
static int parse_refs(PyObject *object, const shml_ref_t **refs, uint32_t *n)
{
    char *bytes;
    Py_ssize_t num_bytes;
    if (PyBytes_AsStringAndSize(object, &bytes, &num_bytes) != 0)
        return 0;
    if (num_bytes % (Py_ssize_t)sizeof(shml_ref_t) != 0 || num_bytes == 0) {
        PyErr_SetString(PyExc_ValueError, "refs must be what get_many returned");
        return 0;
    }
    *refs = (const shml_ref_t *)bytes;
    *n = (uint32_t)(num_bytes / (Py_ssize_t)sizeof(shml_ref_t));
    return 1;
}

static PyObject *segment_guest_get(Segment *self, PyObject *object)
{
    Py_buffer ids;
    uint32_t n, num_missing = 0;
    if (!usable(self) || !parse_array(object, &ids, 8, &n))
        return NULL;
    PyObject *result = NULL, *refs = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)n * (Py_ssize_t)sizeof(shml_ref_t));
    if (refs != NULL) {
        shml_ref_t *out = (shml_ref_t *)PyBytes_AsString(refs);
        CALL(shml_guest_get(&self->seg, ids.buf, n, out, &num_missing));
        result =
            status == SHML_OK ? Py_BuildValue("(OI)", refs, num_missing) : raise_on(&self->seg, status, "guest_get");
    }
    Py_XDECREF(refs);
    PyBuffer_Release(&ids);
    return result;
}

static PyObject *segment_guest_check(Segment *self, PyObject *object)
{
    const shml_ref_t *refs;
    uint32_t n;
    if (!usable(self) || !parse_refs(object, &refs, &n))
        return NULL;
    PyObject *valid = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)n);
    if (valid == NULL)
        return NULL;
    uint8_t *out = (uint8_t *)PyBytes_AsString(valid);
    CALL(shml_guest_check(&self->seg, refs, n, out));
    if (status != SHML_OK) {
        Py_CLEAR(valid);
        raise_on(&self->seg, status, "guest_check");
    }
    return valid;
}

static PyObject *segment_guest_word(Segment *self, PyObject *unused)
{
    (void)unused;
    return usable(self) ? PyLong_FromUnsignedLong(shml_guest_word(&self->seg)) : NULL;
}

static PyObject *segment_guest_wait(Segment *self, PyObject *args)
{
    unsigned int seen, timeout_ms;
    if (!PyArg_ParseTuple(args, "II", &seen, &timeout_ms) || !usable(self))
        return NULL;
    Py_BEGIN_ALLOW_THREADS shml_guest_wait(&self->seg, seen, timeout_ms);
    Py_END_ALLOW_THREADS if (PyErr_CheckSignals() != 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *segment_count_reads(Segment *self, PyObject *object)
{
    Py_buffer buffer;
    uint32_t n;
    if (!usable(self) || !parse_array(object, &buffer, 8, &n))
        return NULL;
    const uint64_t *ids = buffer.buf;
    PyObject *list = PyList_New((Py_ssize_t)n);
    for (uint32_t i = 0; list != NULL && i < n; i++) {
        uint32_t reads;
        int status = shml_count_reads(&self->seg, &ids[i], 1, &reads);
        PyObject *item =
            status == SHML_OK ? PyLong_FromUnsignedLong(reads) : raise_on(&self->seg, status, "count_reads");
        if (item == NULL || PyList_SetItem(list, (Py_ssize_t)i, item) != 0)
            Py_CLEAR(list);
    }
    PyBuffer_Release(&buffer);
    return list;
}

/* Where records lie: `object` is a Mapping or None, for the ring. */
static int parse_base(const Segment *self, PyObject *object, const uint8_t **base, uint64_t *base_bytes)
{
    if (object == Py_None) {
        *base = self->seg.ring;
        *base_bytes = self->seg.ring_bytes;
        return 1;
    }
    if (!Py_IS_TYPE(object, mapping_type)) {
        PyErr_SetString(PyExc_TypeError, "base must be a Mapping or None");
        return 0;
    }
    *base = ((Mapping *)object)->at;
    *base_bytes = ((Mapping *)object)->num_bytes;
    return 1;
}

static PyObject *dims_tuple(const uint32_t *dims)
{
    return Py_BuildValue("(IIIIII)", dims[0], dims[1], dims[2], dims[3], dims[4], dims[5]);
}

static PyObject *segment_fields(Segment *self, PyObject *args)
{
    unsigned long long offset, num_bytes;
    unsigned int num_fields;
    PyObject *base_object = Py_None;
    const uint8_t *base;
    uint64_t base_bytes;
    if (!PyArg_ParseTuple(args, "KKI|O", &offset, &num_bytes, &num_fields, &base_object) || !usable(self) ||
        !parse_base(self, base_object, &base, &base_bytes))
        return NULL;
    if (offset > base_bytes || num_bytes > base_bytes - offset)
        return raise_status(SHML_E_CORRUPT, "fields");
    PyObject *list = PyList_New((Py_ssize_t)num_fields);
    for (uint32_t i = 0; list != NULL && i < num_fields; i++) {
        shml_field_t field;
        int status = shml_record_field(base + offset, num_bytes, i, &field);
        PyObject *item = status == SHML_E_NOTFOUND ? Py_NewRef(Py_None)
                         : status != SHML_OK
                             ? raise_on(&self->seg, status, "fields")
                             : Py_BuildValue("(KKN)", field.offset, field.num_bytes, dims_tuple(field.dims));
        if (item == NULL || PyList_SetItem(list, (Py_ssize_t)i, item) != 0)
            Py_CLEAR(list);
    }
    return list;
}

#define MAX_FIELDS 64
static PyObject *segment_measure(Segment *self, PyObject *args)
{
    PyObject *object, *base_object = Py_None;
    const shml_ref_t *refs;
    const uint8_t *base;
    uint64_t base_bytes;
    uint32_t n;
    unsigned int num_fields;
    shml_measure_t measures[MAX_FIELDS];
    if (!PyArg_ParseTuple(args, "OI|O", &object, &num_fields, &base_object) || !parse_refs(object, &refs, &n) ||
        !usable(self) || !parse_base(self, base_object, &base, &base_bytes))
        return NULL;
    if (num_fields > MAX_FIELDS)
        return raise_status(SHML_E_INVAL, "measure");
    CALL(shml_measure(base, base_bytes, refs, n, num_fields, measures));
    if (status != SHML_OK)
        return raise_on(&self->seg, status, "measure");
    PyObject *list = PyList_New((Py_ssize_t)num_fields);
    for (uint32_t i = 0; list != NULL && i < num_fields; i++) {
        PyObject *item = Py_BuildValue("(NNI)", dims_tuple(measures[i].min_dims), dims_tuple(measures[i].max_dims),
                                       measures[i].num_absent);
        if (item == NULL || PyList_SetItem(list, (Py_ssize_t)i, item) != 0)
            Py_CLEAR(list);
    }
    return list;
}

/* (op, field, item_bytes, dims, pad, scale, shift, out): dims, scale, shift are packed bytes (u32, f32, f32). */
static int parse_op(PyObject *tuple, shml_gather_t *op, Py_buffer *out)
{
    Py_buffer dims, pad, scale, shift;
    memset(op, 0, sizeof *op);
    if (!PyArg_ParseTuple(tuple, "IIIy*y*y*y*w*", &op->op, &op->field, &op->item_bytes, &dims, &pad, &scale, &shift,
                          out))
        return 0;
    int good = dims.len % 4 == 0 && dims.len <= (Py_ssize_t)sizeof op->dims && pad.len <= (Py_ssize_t)sizeof op->pad &&
               scale.len <= (Py_ssize_t)sizeof op->scale && scale.len == shift.len && scale.len % 4 == 0;
    if (good) {
        op->rank = (uint32_t)(dims.len / 4);
        memcpy(op->dims, dims.buf, (size_t)dims.len);
        memcpy(op->pad, pad.buf, (size_t)pad.len);
        memcpy(op->scale, scale.buf, (size_t)scale.len);
        memcpy(op->shift, shift.buf, (size_t)shift.len);
        op->num_channels = (uint32_t)(scale.len / 4);
        op->out = out->buf;
        op->out_bytes = (uint64_t)out->len;
    }
    PyBuffer_Release(&dims);
    PyBuffer_Release(&pad);
    PyBuffer_Release(&scale);
    PyBuffer_Release(&shift);
    if (!good) {
        PyBuffer_Release(out);
        PyErr_SetString(PyExc_ValueError, "a gather operation is malformed");
    }
    return good;
}

static PyObject *segment_gather(Segment *self, PyObject *args)
{
    PyObject *object, *rows_object, *ops_object, *base_object = Py_None;
    const shml_ref_t *refs;
    const uint8_t *base;
    uint64_t base_bytes;
    uint32_t n;
    if (!PyArg_ParseTuple(args, "OOO!|O", &object, &rows_object, &PyList_Type, &ops_object, &base_object) ||
        !parse_refs(object, &refs, &n) || !usable(self) || !parse_base(self, base_object, &base, &base_bytes))
        return NULL;
    const uint32_t *rows = NULL;
    if (rows_object != Py_None) {
        char *bytes;
        Py_ssize_t num_bytes;
        if (PyBytes_AsStringAndSize(rows_object, &bytes, &num_bytes) != 0)
            return NULL;
        if (num_bytes != (Py_ssize_t)n * 4)
            return raise_status(SHML_E_INVAL, "gather");
        rows = (const uint32_t *)bytes;
    }
    shml_gather_t ops[MAX_FIELDS];
    Py_buffer outs[MAX_FIELDS];
    Py_ssize_t num_ops = PyList_Size(ops_object), parsed = 0;
    if (num_ops > MAX_FIELDS)
        return raise_status(SHML_E_INVAL, "gather");
    while (parsed < num_ops && parse_op(PyList_GetItem(ops_object, parsed), &ops[parsed], &outs[parsed]))
        parsed++;
    int status = SHML_OK;
    if (parsed == num_ops) {
        Py_BEGIN_ALLOW_THREADS status = shml_gather(base, base_bytes, refs, n, rows, ops, (uint32_t)num_ops);
        Py_END_ALLOW_THREADS
    }
    for (Py_ssize_t i = 0; i < parsed; i++)
        PyBuffer_Release(&outs[i]);
    if (parsed < num_ops)
        return NULL;
    if (status != SHML_OK)
        return raise_on(&self->seg, status, "gather");
    Py_RETURN_NONE;
}

static PyMethodDef segment_methods[] = {
    {"register", (PyCFunction)segment_register, METH_VARARGS,
     "register(role, owner, owner_gen) -> (slot, gen) or CLIENTS"},
    {"unregister", (PyCFunction)segment_unregister, METH_NOARGS, "Leave; the slot is free."},
    {"reap", (PyCFunction)segment_reap, METH_VARARGS, "reap(now) -> number of dead clients cleaned up after"},
    {"count", (PyCFunction)segment_count, METH_VARARGS, "count(role) -> living clients of that role"},
    {"clients", (PyCFunction)segment_clients, METH_NOARGS, "[(slot, pid, role)] of the clients"},
    {"claim_rows", (PyCFunction)segment_claim_rows, METH_O, "claim_rows(ids u64) -> bytes: 1 where it is ours now"},
    {"unclaim_rows", (PyCFunction)segment_unclaim_rows, METH_O, "unclaim_rows(ids u64): those that are still claimed"},
    {"reserve", (PyCFunction)segment_reserve, METH_VARARGS,
     "reserve(id, num_bytes, stamp, urgent) -> ticket (offset, …), (EXTEND, region, need_end) or a status"},
    {"commit", (PyCFunction)segment_commit, METH_VARARGS, "commit(ticket, record_status) -> status"},
    {"abort", (PyCFunction)segment_abort, METH_O, "abort(ticket) -> status"},
    {"get_many", (PyCFunction)segment_get_many, METH_VARARGS,
     "get_many(ids u64, flags, place) -> (refs, num_missing, pins, over_quota)"},
    {"pinned_bytes", (PyCFunction)segment_pinned_bytes, METH_NOARGS, "Bytes of transit that this process has pinned."},
    {"starved", (PyCFunction)segment_starved, METH_NOARGS, "Grows when what readers wait with is in the way."},
    {"wake_word", (PyCFunction)segment_wake_word, METH_NOARGS, "Read before get_many, for wait."},
    {"wait", (PyCFunction)segment_wait, METH_VARARGS, "wait(seen, timeout_ms): until a want was met, 100 ms at most"},
    {"work_word", (PyCFunction)segment_work_word, METH_NOARGS, "Read before claim, for work_wait."},
    {"work_wait", (PyCFunction)segment_work_wait, METH_VARARGS, "work_wait(seen, timeout_ms): until there may be work"},
    {"work_tell", (PyCFunction)segment_work_tell, METH_NOARGS, "Wake the services."},
    {"guest_get", (PyCFunction)segment_guest_get, METH_O, "guest_get(ids u64) -> (refs, num_missing)"},
    {"guest_check", (PyCFunction)segment_guest_check, METH_O,
     "guest_check(refs) -> bytes: 1 where what was copied since guest_get is the record"},
    {"guest_word", (PyCFunction)segment_guest_word, METH_NOARGS, "Read before guest_get, for guest_wait."},
    {"guest_wait", (PyCFunction)segment_guest_wait, METH_VARARGS,
     "guest_wait(seen, timeout_ms): until a guest's want was met, 100 ms at most"},
    {"look", (PyCFunction)segment_look, METH_VARARGS, "look(ids u64, stamp) -> bytes: ROW_* of each"},
    {"wanted", (PyCFunction)segment_wanted, METH_VARARGS, "wanted(most) -> ids that readers wait for and nobody makes"},
    {"chunk_look", (PyCFunction)segment_chunk_look, METH_O, "chunk_look(chunks u32) -> bytes: the state of each"},
    {"chunk_claim", (PyCFunction)segment_chunk_claim, METH_VARARGS, "chunk_claim(chunk) -> status"},
    {"chunk_claim_open", (PyCFunction)segment_chunk_claim_open, METH_VARARGS,
     "chunk_claim_open(slot, gen, number) -> (chunk, status)"},
    {"chunk_first", (PyCFunction)segment_chunk_first, METH_VARARGS,
     "chunk_first(chunk) -> id of its first row, or None"},
    {"row_chunks", (PyCFunction)segment_row_chunks, METH_O, "row_chunks(ids u64) -> bytes: u32 each, 0xffffffff: none"},
    {"chunk_end", (PyCFunction)segment_chunk_end, METH_VARARGS, "chunk_end(chunk, outcome) -> status"},
    {"chunks_wanted", (PyCFunction)segment_chunks_wanted, METH_VARARGS, "chunks_wanted(most) -> [(chunk, rows)]"},
    {"spill_reserve", (PyCFunction)segment_spill_reserve, METH_VARARGS,
     "spill_reserve(chunk, num_bytes) -> offset, or a status (negative)"},
    {"spill_commit", (PyCFunction)segment_spill_commit, METH_VARARGS,
     "spill_commit(chunk, offset, num_bytes) -> status"},
    {"spill_give_back", (PyCFunction)segment_spill_give_back, METH_VARARGS,
     "spill_give_back(fd, offset, num_bytes): their blocks, of the disk"},
    {"spill_freeze", (PyCFunction)segment_spill_freeze, METH_NOARGS, "spill_freeze() -> whether it was this call"},
    {"spill_find", (PyCFunction)segment_spill_find, METH_VARARGS, "spill_find(chunk) -> (offset, num_bytes) or None"},
    {"raw_release", (PyCFunction)segment_raw_release, METH_VARARGS, "raw_release(ring_fd) -> whether it was"},
    {"count_fetched", (PyCFunction)segment_count_fetched, METH_VARARGS, "count_fetched(num_bytes)"},
    {"count_decoding", (PyCFunction)segment_count_decoding, METH_VARARGS, "count_decoding(ns)"},
    {"order_begin", (PyCFunction)segment_order_begin, METH_VARARGS,
     "order_begin(seed, epoch, num_positions, kind, rank, world_size, drop_last) -> (slot, gen) or a status"},
    {"order_end", (PyCFunction)segment_order_end, METH_VARARGS, "order_end(slot, gen) -> status"},
    {"order_join", (PyCFunction)segment_order_join, METH_VARARGS,
     "order_join(key, reader, num_readers, owner, owner_gen, seed, epoch, num_positions, kind) -> "
     "(slot, gen, num_positions, epoch, seed) or a status"},
    {"order_leave", (PyCFunction)segment_order_leave, METH_VARARGS, "order_leave(slot, gen) -> status"},
    {"order_finish", (PyCFunction)segment_order_finish, METH_VARARGS,
     "order_finish(slot, gen, num_positions) -> status"},
    {"orders", (PyCFunction)segment_orders, METH_NOARGS, "The living orders, a tuple each."},
    {"num_orders", (PyCFunction)segment_num_orders, METH_NOARGS, "How many orders live."},
    {"touch", (PyCFunction)segment_touch, METH_NOARGS, "Tell waiting readers that something moved."},
    {"back", (PyCFunction)segment_back, METH_VARARGS,
     "back(ring_fd, region, need_end) -> (status, available, limited_by)"},
    {"text_put", (PyCFunction)segment_text_put, METH_VARARGS, "text_put(which, text) -> status; the first wins"},
    {"text_get", (PyCFunction)segment_text_get, METH_VARARGS, "text_get(which) -> bytes or None"},
    {"epoch", (PyCFunction)segment_epoch, METH_VARARGS, "epoch([value]) -> the shared epoch"},
    {"stats", (PyCFunction)segment_stats, METH_NOARGS, "All counters."},
    {"progress", (PyCFunction)segment_progress, METH_NOARGS, "A number that grows while anything moves."},
    {"mutex_holder", (PyCFunction)segment_mutex_holder, METH_NOARGS, "Thread id of the mutex's holder, 0: free."},
    {"check", (PyCFunction)segment_check, METH_NOARGS, "The invariant that does not hold, or None."},
    {"count_reads", (PyCFunction)segment_count_reads, METH_O, "count_reads(ids u64) -> reads before this one, each"},
    {"fields", (PyCFunction)segment_fields, METH_VARARGS,
     "fields(offset, num_bytes, num_fields, base=None) -> [(offset, bytes, dims)]"},
    {"measure", (PyCFunction)segment_measure, METH_VARARGS,
     "measure(refs, num_fields, base=None) -> [(min_dims, max_dims, absent)]"},
    {"gather", (PyCFunction)segment_gather, METH_VARARGS, "gather(refs, rows, ops, base=None): fill a batch"},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot segment_slots[] = {
    {Py_tp_new, segment_new},
    {Py_tp_dealloc, segment_dealloc},
    {Py_tp_methods, segment_methods},
    {Py_tp_doc, "Segment(control, ring, lock_fd, boot_id, pid_namespace): this process's handle to a set's memory."},
    {0, NULL},
};
static PyType_Spec segment_spec = {"shmloader._native.Segment", sizeof(Segment), 0, Py_TPFLAGS_DEFAULT, segment_slots};

/* ------------------------------------------------ BatchRing -------------------------------------------- */

typedef struct {
    PyObject_HEAD Mapping *mapping;
    shml_bhandle_t h;
} BatchRing;

static PyObject *batch_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"mapping", "fd", NULL};
    PyObject *mapping;
    int fd;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!i", names, mapping_type, &mapping, &fd))
        return NULL;
    Mapping *m = (Mapping *)mapping;
    int status = m->writable ? shml_batch_check(m->at, m->num_bytes) : SHML_E_INVAL;
    if (status != SHML_OK)
        return raise_status(status, "attach batch ring");
    BatchRing *self = (BatchRing *)PyType_GenericAlloc(type, 0);
    if (self == NULL)
        return NULL;
    self->mapping = (Mapping *)Py_NewRef(mapping);
    self->h = (shml_bhandle_t){
        .batch = (shml_batch_t *)m->at, .map_bytes = m->num_bytes, .fd = fd, .self = -1, .env = &shml_env_linux};
    return (PyObject *)self;
}

static void batch_dealloc(BatchRing *self)
{
    Py_XDECREF((PyObject *)self->mapping);
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    PyObject_Free(self);
    Py_DECREF(type);
}

static int batch_usable(const BatchRing *self)
{
    if (in_home(self->mapping))
        return 1;
    PyErr_SetString(PyExc_RuntimeError, "this batch ring was attached before fork(); attach again in the child");
    return 0;
}

static PyObject *batch_register(BatchRing *self, PyObject *args)
{
    unsigned int role;
    if (!PyArg_ParseTuple(args, "I", &role) || !batch_usable(self))
        return NULL;
    CALL(shml_batch_register(&self->h, role));
    return status == SHML_OK ? PyLong_FromLong(self->h.self)
                             : status_or_raise(NULL, status, "register with the batch ring");
}

static PyObject *batch_acquire(BatchRing *self, PyObject *args)
{
    unsigned long long num_bytes;
    unsigned int max_slots;
    if (!PyArg_ParseTuple(args, "KI", &num_bytes, &max_slots) || !batch_usable(self))
        return NULL;
    shml_slot_t slot;
    CALL(shml_slot_acquire(&self->h, num_bytes, max_slots, &slot));
    if (status != SHML_OK)
        return status_or_raise(NULL, status, "acquire");
    return Py_BuildValue("(KKII)", slot.offset, slot.capacity, slot.index, slot.gen);
}

static int parse_slot(PyObject *tuple, shml_slot_t *slot)
{
    unsigned long long offset, capacity;
    if (!PyTuple_Check(tuple) || !PyArg_ParseTuple(tuple, "KKII", &offset, &capacity, &slot->index, &slot->gen)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "a slot is a tuple");
        return 0;
    }
    slot->offset = offset;
    slot->capacity = capacity;
    return 1;
}

static PyObject *batch_send(BatchRing *self, PyObject *tuple)
{
    shml_slot_t slot;
    if (!parse_slot(tuple, &slot) || !batch_usable(self))
        return NULL;
    return status_or_raise(NULL, shml_slot_send(&self->h, &slot), "send");
}

static PyObject *batch_drop(BatchRing *self, PyObject *tuple)
{
    shml_slot_t slot;
    if (!parse_slot(tuple, &slot) || !batch_usable(self))
        return NULL;
    return status_or_raise(NULL, shml_slot_drop(&self->h, &slot), "drop");
}

static PyObject *batch_adopt(BatchRing *self, PyObject *tuple)
{
    shml_slot_t slot;
    uint32_t held, total;
    if (!parse_slot(tuple, &slot) || !batch_usable(self))
        return NULL;
    int status = shml_slot_adopt(&self->h, &slot, &held, &total);
    if (status != SHML_OK)
        return status_or_raise(NULL, status, "adopt");
    return Py_BuildValue("(II)", held, total);
}

static PyObject *batch_release(BatchRing *self, PyObject *tuple)
{
    shml_slot_t slot;
    if (!parse_slot(tuple, &slot))
        return NULL;
    if (!in_home(self->mapping) || exiting)
        Py_RETURN_NONE;
    return status_or_raise(NULL, shml_slot_release(&self->h, &slot), "release");
}

static PyObject *batch_trim(BatchRing *self, PyObject *unused)
{
    (void)unused;
    if (!batch_usable(self))
        return NULL;
    CALL(shml_batch_trim(&self->h));
    return status >= 0 ? PyLong_FromLong(status) : raise_status(status, "trim the batch ring");
}

static PyObject *batch_stats(BatchRing *self, PyObject *unused)
{
    (void)unused;
    if (!batch_usable(self))
        return NULL;
    shml_batch_stats_t s;
    CALL(shml_batch_get_stats(&self->h, &s));
    if (status != SHML_OK)
        return raise_status(status, "batch stats");
    return Py_BuildValue("{sKsKsIsIsIsIsIsKsK}", "budget_bytes", s.budget_bytes, "backed_bytes", s.backed_bytes,
                         "num_slots", s.num_slots, "num_free", s.num_free, "num_filling", s.num_filling, "num_sent",
                         s.num_sent, "num_held", s.num_held, "num_acquired", s.num_acquired, "num_refused",
                         s.num_refused);
}

static PyMethodDef batch_methods[] = {
    {"register", (PyCFunction)batch_register, METH_VARARGS, "register(role) -> slot of this client, or CLIENTS"},
    {"acquire", (PyCFunction)batch_acquire, METH_VARARGS, "acquire(num_bytes, max_slots) -> slot or a status"},
    {"send", (PyCFunction)batch_send, METH_O, "send(slot): its token goes into the queue"},
    {"drop", (PyCFunction)batch_drop, METH_O, "drop(slot): free it unsent"},
    {"adopt", (PyCFunction)batch_adopt, METH_O, "adopt(slot) -> (held, total) of its worker, or STALE"},
    {"release", (PyCFunction)batch_release, METH_O, "release(slot): the last tensor over it died"},
    {"trim", (PyCFunction)batch_trim, METH_NOARGS, "trim() -> slots whose memory was given back: free ones"},
    {"stats", (PyCFunction)batch_stats, METH_NOARGS, "All counters."},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot batch_slots[] = {
    {Py_tp_new, batch_new},
    {Py_tp_dealloc, batch_dealloc},
    {Py_tp_methods, batch_methods},
    {Py_tp_doc, "BatchRing(mapping, fd): this process's handle to a training process's batch ring."},
    {0, NULL},
};
static PyType_Spec batch_spec = {"shmloader._native.BatchRing", sizeof(BatchRing), 0, Py_TPFLAGS_DEFAULT, batch_slots};

/* ------------------------------------------------ module ----------------------------------------------- */

static PyObject *format_control(PyObject *module, PyObject *args, PyObject *kwargs)
{
    (void)module;
    static char *names[] = {"control",
                            "resident_bytes",
                            "transit_bytes",
                            "raw_bytes",
                            "num_records",
                            "first_rows",
                            "num_rows",
                            "units",
                            "uuid",
                            "boot_id",
                            "pid_namespace",
                            "record_bytes",
                            "raw_budget_bytes",
                            "spill_bytes",
                            "rows_per_chunk",
                            "num_chunks",
                            "most_resident",
                            "most_transit",
                            NULL};
    PyObject *mapping;
    unsigned int rows_per_chunk = 0, num_chunks = 0; /* of an open set */
    unsigned long long resident_bytes, transit_bytes, raw_bytes, num_records, pid_namespace, record_bytes,
        raw_budget_bytes, spill_bytes, most_resident = 0, most_transit = 0;
    Py_buffer first_rows, num_rows, units, uuid, boot_id;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!KKKKy*y*y*y*y*KKKK|IIKK", names, mapping_type, &mapping,
                                     &resident_bytes, &transit_bytes, &raw_bytes, &num_records, &first_rows, &num_rows,
                                     &units, &uuid, &boot_id, &pid_namespace, &record_bytes, &raw_budget_bytes,
                                     &spill_bytes, &rows_per_chunk, &num_chunks, &most_resident, &most_transit))
        return NULL;
    int status = SHML_E_INVAL;
    if (first_rows.len == 2 * num_rows.len && units.len == num_rows.len && uuid.len == 16 && boot_id.len == 16) {
        shml_config_t config = {.resident_bytes = resident_bytes,
                                .transit_bytes = transit_bytes,
                                .raw_bytes = raw_bytes,
                                .num_records = num_records,
                                .num_chunks = rows_per_chunk > 0 ? num_chunks : (uint32_t)(num_rows.len / 4),
                                .rows_per_chunk = rows_per_chunk,
                                .record_bytes = record_bytes,
                                .raw_budget_bytes = raw_budget_bytes,
                                .spill_bytes = spill_bytes,
                                .most_resident = most_resident,
                                .most_transit = most_transit,
                                .pid_namespace = pid_namespace};
        memcpy(config.uuid, uuid.buf, 16);
        memcpy(config.boot_id, boot_id.buf, 16);
        Mapping *m = (Mapping *)mapping;
        status = shml_control_format(m->at, m->num_bytes, &config, first_rows.buf, num_rows.buf, units.buf);
    }
    PyBuffer_Release(&first_rows);
    PyBuffer_Release(&num_rows);
    PyBuffer_Release(&units);
    PyBuffer_Release(&uuid);
    PyBuffer_Release(&boot_id);
    return status == SHML_OK ? Py_NewRef(Py_None) : raise_status(status, "format");
}

static PyObject *control_bytes(PyObject *module, PyObject *args)
{
    (void)module;
    unsigned long long resident_bytes, transit_bytes, raw_bytes, num_records;
    unsigned int num_chunks;
    if (!PyArg_ParseTuple(args, "KKKKI", &resident_bytes, &transit_bytes, &raw_bytes, &num_records, &num_chunks))
        return NULL;
    shml_config_t config = {.resident_bytes = resident_bytes,
                            .transit_bytes = transit_bytes,
                            .raw_bytes = raw_bytes,
                            .num_records = num_records,
                            .num_chunks = num_chunks};
    uint64_t bytes = shml_control_bytes(&config);
    return bytes > 0 ? PyLong_FromUnsignedLongLong(bytes) : raise_status(SHML_E_INVAL, "control_bytes");
}

static PyObject *open_id(PyObject *module, PyObject *args)
{
    (void)module;
    unsigned int slot, gen;
    unsigned long long position;
    if (!PyArg_ParseTuple(args, "IIK", &slot, &gen, &position))
        return NULL;
    if (slot >= SHML_MAX_ORDERS || position > SHML_MAX_POSITION)
        return PyErr_Format(PyExc_ValueError,
                            "an open id needs a slot below %u and a position of %u bits, but got %u, %llu",
                            SHML_MAX_ORDERS, SHML_POSITION_BITS, slot, position);
    return PyLong_FromUnsignedLongLong(shml_open_id(slot, gen, position));
}

static PyObject *format_batch(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *mapping;
    unsigned long long budget_bytes;
    if (!PyArg_ParseTuple(args, "O!K", mapping_type, &mapping, &budget_bytes))
        return NULL;
    Mapping *m = (Mapping *)mapping;
    int status = shml_batch_format(m->at, m->num_bytes, budget_bytes);
    return status == SHML_OK ? Py_NewRef(Py_None) : raise_status(status, "format the batch ring");
}

static PyObject *memory(PyObject *module, PyObject *args)
{
    (void)module;
    const char *root = "";
    if (!PyArg_ParseTuple(args, "|s", &root))
        return NULL;
    shml_memory_t m;
    int status = shml_memory_read(root, &m);
    if (status != SHML_OK)
        return raise_status(status, "memory");
    return Py_BuildValue("(KKs)", m.total_bytes, m.available_bytes, m.limited_by);
}

static PyObject *byte_holder(PyObject *module, PyObject *args)
{
    (void)module;
    int fd;
    unsigned long long offset;
    if (!PyArg_ParseTuple(args, "iK", &fd, &offset))
        return NULL;
    return PyLong_FromLong(shml_byte_holder(fd, offset));
}

static PyObject *fault_report(PyObject *module, PyObject *args)
{
    (void)module;
    const char *advice;
    if (!PyArg_ParseTuple(args, "s", &advice))
        return NULL;
    int status = shml_fault_report(advice);
    return status == SHML_OK ? Py_NewRef(Py_None) : raise_status(status, "fault_report");
}

static PyObject *die_with_parent(PyObject *module, PyObject *args)
{
    (void)module;
    int parent;
    if (!PyArg_ParseTuple(args, "i", &parent))
        return NULL;
    int alive = shml_die_with_parent(parent);
    return alive < 0 ? raise_status(alive, "die_with_parent") : PyBool_FromLong(alive);
}

static PyObject *set_exiting(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    exiting = 1;
    Py_RETURN_NONE;
}

static PyMethodDef module_methods[] = {
    {"format_control", (PyCFunction)(void (*)(void))format_control, METH_VARARGS | METH_KEYWORDS,
     "Make a segment in a zeroed control mapping."},
    {"control_bytes", control_bytes, METH_VARARGS,
     "control_bytes(resident, transit, raw, num_records, num_chunks) -> bytes"},
    {"open_id", open_id, METH_VARARGS, "open_id(slot, gen, position) -> the id of a row of an open set"},
    {"format_batch", format_batch, METH_VARARGS, "format_batch(mapping, budget_bytes)"},
    {"memory", memory, METH_VARARGS, "memory([root]) -> (total, available, limited_by)"},
    {"byte_holder", byte_holder, METH_VARARGS, "byte_holder(fd, offset) -> pid that holds this byte, or 0"},
    {"fault_report", fault_report, METH_VARARGS, "fault_report(advice): tell of writes to read-only views"},
    {"die_with_parent", die_with_parent, METH_VARARGS, "die_with_parent(pid) -> False if that parent is gone already"},
    {"set_exiting", set_exiting, METH_NOARGS, "The interpreter exits: deallocation does nothing from now on."},
    {NULL, NULL, 0, NULL},
};

static int add_type(PyObject *module, PyType_Spec *spec, PyTypeObject **type, const char *name)
{
    *type = (PyTypeObject *)PyType_FromSpec(spec);
    return *type == NULL ? -1 : PyModule_AddObjectRef(module, name, (PyObject *)*type);
}

static int add_constants(PyObject *module)
{
    static const struct {
        const char *name;
        long long value;
    } constants[] = {
        {"NOTFOUND", SHML_E_NOTFOUND},
        {"EXISTS", SHML_E_EXISTS},
        {"FULL", SHML_E_FULL},
        {"TOOBIG", SHML_E_TOOBIG},
        {"EXTEND", SHML_E_EXTEND},
        {"STALE", SHML_E_STALE},
        {"MEMORY", SHML_E_MEMORY},
        {"CLIENTS", SHML_E_CLIENTS},
        {"OWNER", SHML_OWNER},
        {"WORKER", SHML_WORKER},
        {"SERVICE", SHML_SERVICE},
        {"READY", SHML_REF_READY},
        {"ERROR", SHML_REF_ERROR},
        {"MISSING", SHML_REF_MISSING},
        {"BROKEN", SHML_REF_BROKEN},
        {"ASIDE", SHML_REF_ASIDE},
        {"END", SHML_REF_END},
        {"GET_POST", SHML_GET_POST},
        {"GET_TAKE", SHML_GET_TAKE},
        {"ROW_MISSING", SHML_ROW_MISSING},
        {"ROW_SUSPECT", SHML_ROW_SUSPECT},
        {"ROW_WORK", SHML_ROW_WORK},
        {"ROW_TRANSIT", SHML_ROW_TRANSIT},
        {"ROW_FINAL", SHML_ROW_FINAL},
        {"CHUNK_TODO", SHML_CHUNK_TODO},
        {"CHUNK_CLAIMED", SHML_CHUNK_CLAIMED},
        {"CHUNK_DONE", SHML_CHUNK_DONE},
        {"CHUNK_BROKEN", SHML_CHUNK_BROKEN},
        {"CHUNK_STAYS", SHML_CHUNK_STAYS},
        {"CHUNK_HAS_RAW", SHML_CHUNK_HAS_RAW},
        {"FETCH_GIVEN_UP", SHML_FETCH_GIVEN_UP},
        {"FETCH_OK", SHML_FETCH_OK},
        {"FETCH_BROKEN", SHML_FETCH_BROKEN},
        {"RESIDENT", SHML_RESIDENT},
        {"TRANSIT", SHML_TRANSIT},
        {"RAW_REGION", SHML_RAW_REGION},
        {"NO_ORDER", SHML_NO_ORDER},
        {"RAW", (long long)SHML_RAW},
        {"TEXT_SCHEMA", SHML_TEXT_SCHEMA},
        {"TEXT_FATAL", SHML_TEXT_FATAL},
        {"TEXT_MEMORY", SHML_TEXT_MEMORY},
        {"TEXT_REFETCH", SHML_TEXT_REFETCH},
        {"TEXT_BAD_ROW", SHML_TEXT_BAD_ROW},
        {"TEXT_SHOWN", SHML_TEXT_SHOWN},
        {"TEXT_BYTES", SHML_TEXT_BYTES},
        {"COPY", SHML_COPY},
        {"NORMALIZE", SHML_NORMALIZE},
        {"MASK", SHML_MASK},
        {"PRESENT", SHML_PRESENT},
        {"SOURCE", SHML_SOURCE},
        {"MAX_FIELDS", MAX_FIELDS},
        {"REF_BYTES", sizeof(shml_ref_t)},
        {"TICK_MS", SHML_TICK_MS},
        {"MAX_ATTEMPTS", SHML_MAX_ATTEMPTS},
        {"MAX_CLIENTS", SHML_MAX_CLIENTS},
        {"MAX_WANTS", SHML_MAX_WANTS},
        {"MAX_ORDERS", SHML_MAX_ORDERS},
        {"POSITION_BITS", SHML_POSITION_BITS},
    };
    for (size_t i = 0; i < sizeof constants / sizeof *constants; i++) {
        PyObject *value = PyLong_FromLongLong(constants[i].value);
        if (value == NULL || PyModule_AddObjectRef(module, constants[i].name, value) != 0) {
            Py_XDECREF(value);
            return -1;
        }
        Py_DECREF(value);
    }
    PyObject *chunk_error = PyLong_FromUnsignedLongLong(SHML_CHUNK_ERROR);
    int failed = chunk_error == NULL || PyModule_AddObjectRef(module, "CHUNK_ERROR", chunk_error) != 0;
    Py_XDECREF(chunk_error);
    return failed ? -1 : 0;
}

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    "_native",
    "The shared-memory core of shmloader.",
    -1,
    module_methods,
    NULL,
    NULL,
    NULL,
    NULL,
};

PyMODINIT_FUNC PyInit__native(void)
{
    errors_module = PyImport_ImportModule("shmloader.errors");
    PyObject *module = errors_module == NULL ? NULL : PyModule_Create(&module_def);
    if (module == NULL)
        return NULL;
    if (add_type(module, &mapping_spec, &mapping_type, "Mapping") != 0 ||
        add_type(module, &view_spec, &view_type, "View") != 0 ||
        add_type(module, &pins_spec, &pins_type, "Pins") != 0 ||
        add_type(module, &segment_spec, &segment_type, "Segment") != 0 ||
        add_type(module, &batch_spec, &batch_type, "BatchRing") != 0 || add_constants(module) != 0) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
