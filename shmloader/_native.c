/* _native.c - the binding of the core; the only file with Python.h.
 *
 * Glue: it checks arguments, gives up the GIL, calls the core and turns a status into an exception of
 * shmloader.errors. What a caller handles as a matter of course (exists, full, extend, not found, stale)
 * comes back as a negative int instead.
 *
 * One long file, in four parts (Mapping and View, Segment, BatchRing, the module): what is shared is small, and a
 * second file with Python.h would be a second place for the core's independence of Python to end.
 *
 * Lifetimes: a View keeps its Mapping, so memory is unmapped only when the last array or tensor over it is gone.
 * In a forked child, and while the interpreter exits, deallocation does nothing.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
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
        {SHML_E_CLIENTS, "RingError", "256 processes are attached already; end some or use fewer workers"},
        {SHML_E_NAMESPACE, "RingError", "the segment was made in another PID namespace"},
        {SHML_E_CORRUPT, "RingError", "a record is not what its header says"},
        {SHML_E_MEMORY, "MemoryLimitError", "not enough memory; set SHMLOADER_RING_BYTES lower"},
        {SHML_E_FULL, "RingFullError", "no room"},
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
        status == SHML_E_EXTEND || status == SHML_E_STALE || status == SHML_E_TOOBIG || status == SHML_E_MEMORY)
        return PyLong_FromLong(status);
    return seg == NULL ? raise_status(status, what) : raise_on(seg, status, what);
}

/* ------------------------------------------------ Mapping ---------------------------------------------- */

typedef struct {
    PyObject_HEAD uint8_t *at;
    uint64_t num_bytes;
    uint64_t forks;
    int writable;
} Mapping;

static PyTypeObject *mapping_type, *view_type, *segment_type, *batch_type;

static int in_home(const Mapping *m) { return m->forks == shml_forks(); }

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
    Py_BEGIN_ALLOW_THREADS self->at = shml_map(fd, num_bytes, writable, name);
    Py_END_ALLOW_THREADS if (self->at == NULL)
    {
        Py_DECREF(self);
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return (PyObject *)self;
}

static void mapping_dealloc(Mapping *self)
{
    if (self->at != NULL && in_home(self) && !exiting)
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
    {Py_tp_doc, "Mapping(fd, num_bytes, writable, name): shared memory of this process; unmapped with its last view."},
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
    self->seg = (shml_seg_t){.control = (shml_control_t *)c->at,
                             .ring = r->at,
                             .ring_bytes = r->num_bytes,
                             .lock_fd = lock_fd,
                             .self = -1,
                             .env = &shml_env_linux};
    return (PyObject *)self;
}

static void segment_dealloc(Segment *self)
{
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
        return raise_on(&self->seg, status, "register");
    return Py_BuildValue("(iI)", self->seg.self, shml_client_gen(&self->seg, self->seg.self));
}

static PyObject *segment_unregister(Segment *self, PyObject *unused)
{
    (void)unused;
    if (in_home(self->control)) {
        Py_BEGIN_ALLOW_THREADS shml_client_unregister(&self->seg);
        Py_END_ALLOW_THREADS
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

static PyObject *segment_reserve(Segment *self, PyObject *args)
{
    unsigned long long id, num_bytes;
    if (!PyArg_ParseTuple(args, "KK", &id, &num_bytes) || !usable(self))
        return NULL;
    shml_ticket_t ticket;
    CALL(shml_reserve(&self->seg, id, num_bytes, &ticket));
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

static PyObject *segment_get_many(Segment *self, PyObject *args)
{
    Py_buffer ids;
    int post;
    if (!PyArg_ParseTuple(args, "y*p", &ids, &post))
        return NULL;
    PyObject *refs = NULL;
    uint32_t num_missing = 0, n = (uint32_t)(ids.len / 8);
    if (usable(self) &&
        (refs = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)n * (Py_ssize_t)sizeof(shml_ref_t))) != NULL) {
        shml_ref_t *out = (shml_ref_t *)PyBytes_AsString(refs);
        CALL(shml_get_many(&self->seg, ids.buf, n, post, out, &num_missing));
        if (status != SHML_OK) {
            Py_CLEAR(refs);
            raise_on(&self->seg, status, "get_many");
        }
    }
    PyBuffer_Release(&ids);
    return refs == NULL ? NULL : Py_BuildValue("(NI)", refs, num_missing);
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

static PyObject *segment_have(Segment *self, PyObject *args)
{
    unsigned long long first;
    unsigned int n;
    if (!PyArg_ParseTuple(args, "KI", &first, &n) || !usable(self))
        return NULL;
    PyObject *bits = PyBytes_FromStringAndSize(NULL, ((Py_ssize_t)n + 7) / 8);
    if (bits == NULL)
        return NULL;
    uint8_t *out = (uint8_t *)PyBytes_AsString(bits);
    CALL(shml_have(&self->seg, first, n, out));
    if (status != SHML_OK) {
        Py_DECREF(bits);
        return raise_on(&self->seg, status, "have");
    }
    return bits;
}

#define MAX_WANTED 4096
static PyObject *segment_wanted(Segment *self, PyObject *args)
{
    unsigned long long first;
    unsigned int n;
    uint64_t ids[MAX_WANTED];
    if (!PyArg_ParseTuple(args, "KI", &first, &n) || !usable(self))
        return NULL;
    CALL(shml_wanted(&self->seg, first, n, ids, MAX_WANTED));
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

static PyObject *segment_claim(Segment *self, PyObject *unused)
{
    (void)unused;
    if (!usable(self))
        return NULL;
    uint32_t chunk = 0;
    CALL(shml_chunk_claim(&self->seg, &chunk));
    return status == SHML_OK ? PyLong_FromUnsignedLong(chunk) : status_or_raise(&self->seg, status, "claim");
}

static PyObject *segment_finish(Segment *self, PyObject *args)
{
    unsigned int chunk;
    int broken;
    if (!PyArg_ParseTuple(args, "Ip", &chunk, &broken) || !usable(self))
        return NULL;
    CALL(broken ? shml_chunk_broken(&self->seg, chunk) : shml_chunk_done(&self->seg, chunk));
    return status_or_raise(&self->seg, status, "finish");
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
    unsigned long long need_end;
    if (!PyArg_ParseTuple(args, "iK", &fd, &need_end) || !usable(self))
        return NULL;
    shml_memory_t memory = {0};
    CALL(shml_ring_back(&self->seg, fd, need_end, &memory));
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
    return Py_BuildValue("{sKsKsKsKsKsKsKsKsKsKsKsIsIsIsIsIsIsIsIsIsIsI}", "num_records", s.num_records, "head_bytes",
                         s.head_bytes, "ring_bytes", s.ring_bytes, "resident_bytes", s.resident_bytes, "backed_bytes",
                         s.backed_bytes, "used_bytes", s.used_bytes, "num_ready", s.num_ready, "num_errors",
                         s.num_errors, "num_reserved", s.num_reserved, "num_commits", s.num_commits, "progress",
                         s.progress, "chunks_todo", s.chunks_todo, "chunks_claimed", s.chunks_claimed, "chunks_done",
                         s.chunks_done, "chunks_broken", s.chunks_broken, "num_owners", s.num_owners, "num_workers",
                         s.num_workers, "num_services", s.num_services, "num_reaped", s.num_reaped, "num_services_lost",
                         s.num_services_lost, "num_rebuilds", s.num_rebuilds, "frozen", s.frozen);
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

static PyObject *segment_count_reads(Segment *self, PyObject *object)
{
    const shml_ref_t *refs;
    uint32_t n;
    if (!parse_refs(object, &refs, &n) || !usable(self))
        return NULL;
    PyObject *list = PyList_New((Py_ssize_t)n);
    for (uint32_t i = 0; list != NULL && i < n; i++) {
        uint32_t reads;
        int status = shml_count_reads(&self->seg, &refs[i], 1, &reads);
        PyObject *item =
            status == SHML_OK ? PyLong_FromUnsignedLong(reads) : raise_on(&self->seg, status, "count_reads");
        if (item == NULL || PyList_SetItem(list, (Py_ssize_t)i, item) != 0)
            Py_CLEAR(list);
    }
    return list;
}

static PyObject *dims_tuple(const uint32_t *dims)
{
    return Py_BuildValue("(IIIIII)", dims[0], dims[1], dims[2], dims[3], dims[4], dims[5]);
}

static PyObject *segment_fields(Segment *self, PyObject *args)
{
    unsigned long long offset, num_bytes;
    unsigned int num_fields;
    if (!PyArg_ParseTuple(args, "KKI", &offset, &num_bytes, &num_fields) || !usable(self))
        return NULL;
    if (offset > self->seg.ring_bytes || num_bytes > self->seg.ring_bytes - offset)
        return raise_status(SHML_E_CORRUPT, "fields");
    PyObject *list = PyList_New((Py_ssize_t)num_fields);
    for (uint32_t i = 0; list != NULL && i < num_fields; i++) {
        shml_field_t field;
        int status = shml_record_field(self->seg.ring + offset, num_bytes, i, &field);
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
    PyObject *object;
    const shml_ref_t *refs;
    uint32_t n;
    unsigned int num_fields;
    shml_measure_t measures[MAX_FIELDS];
    if (!PyArg_ParseTuple(args, "OI", &object, &num_fields) || !parse_refs(object, &refs, &n) || !usable(self))
        return NULL;
    if (num_fields > MAX_FIELDS)
        return raise_status(SHML_E_INVAL, "measure");
    CALL(shml_measure(self->seg.ring, self->seg.ring_bytes, refs, n, num_fields, measures));
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
    PyObject *object, *rows_object, *ops_object;
    const shml_ref_t *refs;
    uint32_t n;
    if (!PyArg_ParseTuple(args, "OOO!", &object, &rows_object, &PyList_Type, &ops_object) ||
        !parse_refs(object, &refs, &n) || !usable(self))
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
        Py_BEGIN_ALLOW_THREADS status =
            shml_gather(self->seg.ring, self->seg.ring_bytes, refs, n, rows, ops, (uint32_t)num_ops);
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
    {"register", (PyCFunction)segment_register, METH_VARARGS, "register(role, owner, owner_gen) -> (slot, gen)"},
    {"unregister", (PyCFunction)segment_unregister, METH_NOARGS, "Leave; the slot is free."},
    {"reap", (PyCFunction)segment_reap, METH_VARARGS, "reap(now) -> number of dead clients cleaned up after"},
    {"count", (PyCFunction)segment_count, METH_VARARGS, "count(role) -> living clients of that role"},
    {"clients", (PyCFunction)segment_clients, METH_NOARGS, "[(slot, pid, role)] of the clients"},
    {"reserve", (PyCFunction)segment_reserve, METH_VARARGS, "reserve(id, num_bytes) -> ticket (offset, …) or a status"},
    {"commit", (PyCFunction)segment_commit, METH_VARARGS, "commit(ticket, record_status) -> status"},
    {"abort", (PyCFunction)segment_abort, METH_O, "abort(ticket) -> status"},
    {"get_many", (PyCFunction)segment_get_many, METH_VARARGS, "get_many(ids u64, post) -> (refs, num_missing)"},
    {"wake_word", (PyCFunction)segment_wake_word, METH_NOARGS, "Read before get_many, for wait."},
    {"wait", (PyCFunction)segment_wait, METH_VARARGS, "wait(seen, timeout_ms): until a want was met, 100 ms at most"},
    {"work_word", (PyCFunction)segment_work_word, METH_NOARGS, "Read before claim, for work_wait."},
    {"work_wait", (PyCFunction)segment_work_wait, METH_VARARGS, "work_wait(seen, timeout_ms): until there may be work"},
    {"have", (PyCFunction)segment_have, METH_VARARGS, "have(first, n) -> bitmap of the ids that are there"},
    {"wanted", (PyCFunction)segment_wanted, METH_VARARGS, "wanted(first, n) -> ids that readers wait for"},
    {"claim", (PyCFunction)segment_claim, METH_NOARGS, "claim() -> chunk or a status"},
    {"finish", (PyCFunction)segment_finish, METH_VARARGS, "finish(chunk, broken) -> status"},
    {"touch", (PyCFunction)segment_touch, METH_NOARGS, "Tell waiting readers that something moved."},
    {"back", (PyCFunction)segment_back, METH_VARARGS, "back(ring_fd, need_end) -> (status, available, limited_by)"},
    {"text_put", (PyCFunction)segment_text_put, METH_VARARGS, "text_put(which, text) -> status; the first wins"},
    {"text_get", (PyCFunction)segment_text_get, METH_VARARGS, "text_get(which) -> bytes or None"},
    {"epoch", (PyCFunction)segment_epoch, METH_VARARGS, "epoch([value]) -> the shared epoch"},
    {"stats", (PyCFunction)segment_stats, METH_NOARGS, "All counters."},
    {"progress", (PyCFunction)segment_progress, METH_NOARGS, "A number that grows while anything moves."},
    {"mutex_holder", (PyCFunction)segment_mutex_holder, METH_NOARGS, "Thread id of the mutex's holder, 0: free."},
    {"check", (PyCFunction)segment_check, METH_NOARGS, "The invariant that does not hold, or None."},
    {"count_reads", (PyCFunction)segment_count_reads, METH_O, "count_reads(refs) -> reads before this one, each"},
    {"fields", (PyCFunction)segment_fields, METH_VARARGS,
     "fields(offset, num_bytes, num_fields) -> [(offset, bytes, dims)]"},
    {"measure", (PyCFunction)segment_measure, METH_VARARGS,
     "measure(refs, num_fields) -> [(min_dims, max_dims, absent)]"},
    {"gather", (PyCFunction)segment_gather, METH_VARARGS, "gather(refs, rows, ops): fill a batch"},
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
    return status == SHML_OK ? PyLong_FromLong(self->h.self) : raise_status(status, "register with the batch ring");
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
    {"register", (PyCFunction)batch_register, METH_VARARGS, "register(role) -> slot of this client"},
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
    static char *names[] = {"control",    "ring_bytes", "resident_bytes", "num_records", "is_sequential",
                            "first_rows", "num_rows",   "uuid",           "boot_id",     "pid_namespace",
                            NULL};
    PyObject *mapping;
    unsigned long long ring_bytes, resident_bytes, num_records, pid_namespace;
    int is_sequential;
    Py_buffer first_rows, num_rows, uuid, boot_id;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!KKKpy*y*y*y*K", names, mapping_type, &mapping, &ring_bytes,
                                     &resident_bytes, &num_records, &is_sequential, &first_rows, &num_rows, &uuid,
                                     &boot_id, &pid_namespace))
        return NULL;
    int status = SHML_E_INVAL;
    if (first_rows.len == 2 * num_rows.len && uuid.len == 16 && boot_id.len == 16) {
        shml_config_t config = {.ring_bytes = ring_bytes,
                                .resident_bytes = resident_bytes,
                                .num_records = num_records,
                                .num_chunks = (uint32_t)(num_rows.len / 4),
                                .is_sequential = (uint32_t)is_sequential,
                                .pid_namespace = pid_namespace};
        memcpy(config.uuid, uuid.buf, 16);
        memcpy(config.boot_id, boot_id.buf, 16);
        Mapping *m = (Mapping *)mapping;
        status = shml_control_format(m->at, m->num_bytes, &config, first_rows.buf, num_rows.buf);
    }
    PyBuffer_Release(&first_rows);
    PyBuffer_Release(&num_rows);
    PyBuffer_Release(&uuid);
    PyBuffer_Release(&boot_id);
    return status == SHML_OK ? Py_NewRef(Py_None) : raise_status(status, "format");
}

static PyObject *control_bytes(PyObject *module, PyObject *args)
{
    (void)module;
    unsigned long long ring_bytes, num_records;
    unsigned int num_chunks;
    if (!PyArg_ParseTuple(args, "KKI", &ring_bytes, &num_records, &num_chunks))
        return NULL;
    shml_config_t config = {
        .ring_bytes = ring_bytes, .resident_bytes = ring_bytes, .num_records = num_records, .num_chunks = num_chunks};
    uint64_t bytes = shml_control_bytes(&config);
    return bytes > 0 ? PyLong_FromUnsignedLongLong(bytes) : raise_status(SHML_E_INVAL, "control_bytes");
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
    {"control_bytes", control_bytes, METH_VARARGS, "control_bytes(ring_bytes, num_records, num_chunks) -> bytes"},
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
        {"OWNER", SHML_OWNER},
        {"WORKER", SHML_WORKER},
        {"SERVICE", SHML_SERVICE},
        {"READY", SHML_REF_READY},
        {"ERROR", SHML_REF_ERROR},
        {"MISSING", SHML_REF_MISSING},
        {"BROKEN", SHML_REF_BROKEN},
        {"TEXT_SCHEMA", SHML_TEXT_SCHEMA},
        {"TEXT_FATAL", SHML_TEXT_FATAL},
        {"TEXT_BYTES", SHML_TEXT_BYTES},
        {"COPY", SHML_COPY},
        {"NORMALIZE", SHML_NORMALIZE},
        {"MASK", SHML_MASK},
        {"PRESENT", SHML_PRESENT},
        {"SOURCE", SHML_SOURCE},
        {"REF_BYTES", sizeof(shml_ref_t)},
        {"TICK_MS", SHML_TICK_MS},
        {"MAX_ATTEMPTS", SHML_MAX_ATTEMPTS},
        {"MAX_CLIENTS", SHML_MAX_CLIENTS},
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
        add_type(module, &segment_spec, &segment_type, "Segment") != 0 ||
        add_type(module, &batch_spec, &batch_type, "BatchRing") != 0 || add_constants(module) != 0) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
