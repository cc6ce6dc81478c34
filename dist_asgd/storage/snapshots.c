/* The passes over many tensors that snapshots.py makes, each in one call. This Python module needs no torch headers: it
 * reads tensors through the table of C functions that torch publishes for the purpose (DLPack's exchange API, dlpack.h,
 * major version 1). A record describes one tensor; `described` is a sequence of records. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#define VERSION 3
enum { DLPACK_MAJOR = 1, MAX_DIMS = 64, NO_TENSOR = -1 };

typedef struct {
    void *data;
    struct { int32_t type, id; } device;
    int32_t ndim;
    struct { uint8_t code, bits; uint16_t lanes; } dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} dl_tensor;

typedef struct {
    struct { uint32_t major, minor; } version;
    void *previous;
    void *allocate, *export, *import;
    int (*read)(void *tensor, dl_tensor *out); /* lends shape and strides; returns -1 with an exception set */
} dl_exchange;

/* The head of a record; the shape and then the strides follow it, `ndim` numbers of 8 bytes each. */
typedef struct {
    uint64_t address;
    int32_t device_type, device_id, ndim;
    uint32_t dtype;
} record;

static const dl_exchange *exchange_of(PyObject *capsule) {
    const dl_exchange *exchange = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    if (exchange && (exchange->version.major != DLPACK_MAJOR || !exchange->read)) {
        PyErr_SetString(PyExc_RuntimeError, "another major version of DLPack");
        return NULL;
    }
    return exchange;
}

/* Reads a tensor into `seen` and the head of its record. Returns -1 with an exception set if DLPack cannot read it. */
static int look(const dl_exchange *exchange, PyObject *tensor, dl_tensor *seen, record *what) {
    if (exchange->read(tensor, seen)) return -1;
    if (seen->ndim < 0 || seen->ndim > MAX_DIMS) {
        PyErr_SetString(PyExc_RuntimeError, "too many dimensions");
        return -1;
    }
    *what = (record){
        (uint64_t)(uintptr_t)seen->data + seen->byte_offset,
        seen->device.type,
        seen->device.id,
        seen->ndim,
        (uint32_t)seen->dtype.code << 24 | (uint32_t)seen->dtype.bits << 16 | seen->dtype.lanes,
    };
    return 0;
}

/* Whether `seen` has the device, dtype, shape and strides of a record. The strides of dimensions of size 1 do not
 * matter. `sizes` has the shape and then the strides of the record. */
static int is_alike(const dl_tensor *seen, const record *what, const record *wanted, const int64_t *sizes) {
    if (what->device_type != wanted->device_type || what->device_id != wanted->device_id ||
        what->ndim != wanted->ndim || what->dtype != wanted->dtype)
        return 0;
    for (int32_t d = 0; d < wanted->ndim; d++)
        if (seen->shape[d] != sizes[d] || (sizes[d] != 1 && seen->strides[d] != sizes[wanted->ndim + d])) return 0;
    return 1;
}

/* Reads the record at `*at` and moves `*at` behind it; shape and strides go to `sizes`. Returns -1 with an exception
 * set past the end. */
static int next_record(const char **at, const char *end, record *wanted, int64_t *sizes) {
    if (end - *at < (Py_ssize_t)sizeof(record)) goto torn;
    memcpy(wanted, *at, sizeof(record));
    *at += sizeof(record);
    if (wanted->ndim > 0) {
        Py_ssize_t bytes = 2 * wanted->ndim * (Py_ssize_t)sizeof(int64_t);
        if (wanted->ndim > MAX_DIMS || end - *at < bytes) goto torn;
        memcpy(sizes, *at, (size_t)bytes);
        *at += bytes;
    }
    return 0;
torn:
    PyErr_SetString(PyExc_ValueError, "these are not the tensors that were described");
    return -1;
}

/* describe(tensors, exchange) -> bytes: a record for each tensor; one with ndim NO_TENSOR for None. */
static PyObject *describe(PyObject *module, PyObject *args) {
    PyObject *tensors, *capsule;
    if (!PyArg_ParseTuple(args, "O!O:describe", &PyList_Type, &tensors, &capsule)) return NULL;
    const dl_exchange *exchange = exchange_of(capsule);
    if (!exchange) return NULL;
    Py_ssize_t count = PyList_GET_SIZE(tensors);
    size_t room = (size_t)count * (sizeof(record) + 2 * MAX_DIMS * sizeof(int64_t));
    char *records = PyMem_Malloc(room ? room : 1), *at = records;
    if (!records) return PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *tensor = PyList_GET_ITEM(tensors, i);
        record what = {.ndim = NO_TENSOR};
        dl_tensor seen;
        if (tensor != Py_None && look(exchange, tensor, &seen, &what)) {
            PyMem_Free(records);
            return NULL;
        }
        memcpy(at, &what, sizeof what);
        at += sizeof what;
        if (what.ndim > 0) {
            size_t bytes = (size_t)what.ndim * sizeof(int64_t);
            memcpy(at, seen.shape, bytes);
            memcpy(at + bytes, seen.strides, bytes);
            at += 2 * bytes;
        }
    }
    PyObject *described = PyBytes_FromStringAndSize(records, at - records);
    PyMem_Free(records);
    return described;
}

/* unchanged(tensors, described, exchange) -> bool: whether all tensors still have the properties in their records. */
static PyObject *unchanged(PyObject *module, PyObject *args) {
    PyObject *tensors, *capsule;
    const char *at;
    Py_ssize_t length;
    if (!PyArg_ParseTuple(args, "O!y#O:unchanged", &PyList_Type, &tensors, &at, &length, &capsule)) return NULL;
    const dl_exchange *exchange = exchange_of(capsule);
    if (!exchange) return NULL;
    const char *end = at + length;
    int64_t sizes[2 * MAX_DIMS];
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors); i++) {
        PyObject *tensor = PyList_GET_ITEM(tensors, i);
        record wanted, what;
        dl_tensor seen;
        if (next_record(&at, end, &wanted, sizes)) return NULL;
        if (wanted.ndim == NO_TENSOR) continue;
        if (look(exchange, tensor, &seen, &what)) {
            /* DLPack could read the tensor once, so it has changed. */
            PyErr_Clear();
            Py_RETURN_FALSE;
        }
        if (what.address != wanted.address || !is_alike(&seen, &what, &wanted, sizes)) Py_RETURN_FALSE;
    }
    Py_RETURN_TRUE;
}

/* The attribute `name` of many objects, one after the other. What a class has for it is looked up once for a row of
 * objects of that class; if that is a getter in C, as for `grad`, the getter is called directly. */
typedef struct {
    PyObject *name, *descriptor;
    PyTypeObject *type;
    PyGetSetDef *getset; /* NULL if the attribute has to be looked up on each object */
} attribute;

static PyObject *attribute_of(attribute *a, PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    if (type != a->type) {
        Py_CLEAR(a->descriptor);
        a->type = type;
        a->getset = NULL;
        if (type->tp_getattro == PyObject_GenericGetAttr) {
            /* A descriptor of this kind stands before whatever the object itself has under the name. */
            a->descriptor = PyObject_GetAttr((PyObject *)type, a->name);
            if (!a->descriptor) PyErr_Clear();
            else if (Py_IS_TYPE(a->descriptor, &PyGetSetDescr_Type) &&
                     PyType_IsSubtype(type, ((PyDescrObject *)a->descriptor)->d_type))
                a->getset = ((PyGetSetDescrObject *)a->descriptor)->d_getset;
        }
    }
    return a->getset && a->getset->get ? a->getset->get(object, a->getset->closure) : PyObject_GetAttr(object, a->name);
}

/* Calls a method of torch's tensors that has no arguments. */
static PyObject *call_method(PyObject *method, PyObject *tensor) {
    if (Py_IS_TYPE(method, &PyMethodDescr_Type)) {
        PyMethodDef *definition = ((PyMethodDescrObject *)method)->d_method;
        if (definition->ml_flags == METH_NOARGS) return definition->ml_meth(tensor, NULL);
    }
    return PyObject_CallOneArg(method, tensor);
}

/* Whether `gradient` is direct: a plain tensor of the wanted kind whose memory holds the values that it reads as. Sets
 * `*address`. Returns -1 with an exception set. */
static int is_direct(const dl_exchange *exchange, PyObject *gradient, PyObject *type, PyObject *is_neg,
                     const record *wanted, const int64_t *sizes, uint64_t *address) {
    dl_tensor seen;
    record what;
    if ((PyObject *)Py_TYPE(gradient) != type) return 0;
    if (look(exchange, gradient, &seen, &what)) {
        PyErr_Clear(); /* a sparse tensor, for example */
        return 0;
    }
    *address = what.address;
    if (!is_alike(&seen, &what, wanted, sizes)) return 0;
    PyObject *negated = call_method(is_neg, gradient);
    if (!negated) return -1;
    Py_DECREF(negated); /* True and False live on */
    return negated != Py_True;
}

/* gradients(params, described, exchange, type, is_neg, addresses) -> (list, bytes, bool)
 *
 * Returns the gradient of each parameter, or None; a byte for each, 1 if it has a gradient; and whether all gradients
 * are direct. `addresses` has 8 bytes for each parameter. It is complete only if all gradients are direct: the address
 * of each, 0 for a parameter that has none. */
static PyObject *gradients(PyObject *module, PyObject *args) {
    PyObject *params, *capsule, *type, *is_neg, *found = NULL, *present = NULL, *result = NULL;
    attribute grad = {0};
    const char *at;
    Py_ssize_t length;
    Py_buffer addresses;
    if (!PyArg_ParseTuple(args, "O!y#OOOw*:gradients", &PyList_Type, &params, &at, &length, &capsule, &type, &is_neg,
                          &addresses))
        return NULL;
    const dl_exchange *exchange = exchange_of(capsule);
    const char *end = at + length;
    int64_t sizes[2 * MAX_DIMS];
    Py_ssize_t count = PyList_GET_SIZE(params);
    int direct = 1;
    if (!exchange) goto done;
    if (addresses.len != count * 8) {
        PyErr_SetString(PyExc_ValueError, "an address of 8 bytes for each parameter");
        goto done;
    }
    grad.name = PyUnicode_InternFromString("grad");
    found = PyList_New(count);
    present = PyBytes_FromStringAndSize(NULL, count);
    if (!grad.name || !found || !present) goto done;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *param = PyList_GET_ITEM(params, i), *gradient;
        record wanted;
        uint64_t address = 0;
        if (next_record(&at, end, &wanted, sizes)) goto done;
        gradient = wanted.ndim == NO_TENSOR ? Py_NewRef(Py_None) : attribute_of(&grad, param);
        if (!gradient) goto done;
        PyList_SET_ITEM(found, i, gradient);
        PyBytes_AS_STRING(present)[i] = gradient != Py_None;
        if (gradient != Py_None && direct) {
            direct = is_direct(exchange, gradient, type, is_neg, &wanted, sizes, &address);
            if (direct < 0) goto done;
        }
        memcpy((char *)addresses.buf + 8 * i, &address, 8);
    }
    result = Py_BuildValue("OOO", found, present, direct ? Py_True : Py_False);
done:
    PyBuffer_Release(&addresses);
    Py_XDECREF(grad.name);
    Py_XDECREF(grad.descriptor);
    Py_XDECREF(found);
    Py_XDECREF(present);
    return result;
}

/* unexpected(params, expected) -> list: the positions at which the gradient of a parameter is not the very object that
 * `expected` has there (None for no gradient). */
static PyObject *unexpected(PyObject *module, PyObject *args) {
    PyObject *params, *expected, *found = NULL;
    attribute grad = {0};
    if (!PyArg_ParseTuple(args, "O!O!:unexpected", &PyList_Type, &params, &PyList_Type, &expected)) return NULL;
    Py_ssize_t count = PyList_GET_SIZE(params);
    if (PyList_GET_SIZE(expected) != count) {
        PyErr_SetString(PyExc_ValueError, "a gradient for each parameter");
        return NULL;
    }
    grad.name = PyUnicode_InternFromString("grad");
    found = PyList_New(0);
    for (Py_ssize_t i = 0; grad.name && found && i < count; i++) {
        PyObject *gradient = attribute_of(&grad, PyList_GET_ITEM(params, i));
        if (gradient) Py_DECREF(gradient); /* the parameter keeps it */
        if (gradient && gradient == PyList_GET_ITEM(expected, i)) continue;
        PyObject *position = gradient ? PyLong_FromSsize_t(i) : NULL;
        if (!position || PyList_Append(found, position)) Py_CLEAR(found);
        Py_XDECREF(position);
    }
    Py_XDECREF(grad.name);
    Py_XDECREF(grad.descriptor);
    return grad.name ? found : (Py_XDECREF(found), NULL);
}

/* shows(shown, keys, kept) -> bool
 *
 * `kept` lists a parameter and the values of its entries, one for each of `keys`; then the next parameter, and so on.
 * Returns whether the dict `shown` begins with these parameters, and the dict of each with these keys and values: the
 * very objects, in this order. */
static PyObject *shows(PyObject *module, PyObject *args) {
    PyObject *shown, *keys, *kept, *key, *entries, *entry_key, *value;
    if (!PyArg_ParseTuple(args, "O!O!O!:shows", &PyDict_Type, &shown, &PyTuple_Type, &keys, &PyList_Type, &kept))
        return NULL;
    Py_ssize_t num_keys = PyTuple_GET_SIZE(keys), total = PyList_GET_SIZE(kept), at = 0;
    for (Py_ssize_t i = 0; i + num_keys < total; i += 1 + num_keys) {
        if (!PyDict_Next(shown, &at, &key, &entries) || key != PyList_GET_ITEM(kept, i) || !PyDict_Check(entries))
            Py_RETURN_FALSE;
        Py_ssize_t inside = 0;
        for (Py_ssize_t k = 0; k < num_keys; k++)
            if (!PyDict_Next(entries, &inside, &entry_key, &value) || entry_key != PyTuple_GET_ITEM(keys, k) ||
                value != PyList_GET_ITEM(kept, i + 1 + k))
                Py_RETURN_FALSE;
    }
    Py_RETURN_TRUE;
}

/* same(a, b) -> bool: whether two lists hold the very same objects, in the same order. */
static PyObject *same(PyObject *module, PyObject *args) {
    PyObject *a, *b;
    if (!PyArg_ParseTuple(args, "O!O!:same", &PyList_Type, &a, &PyList_Type, &b)) return NULL;
    Py_ssize_t count = PyList_GET_SIZE(a);
    int equal = count == PyList_GET_SIZE(b);
    for (Py_ssize_t i = 0; equal && i < count; i++) equal = PyList_GET_ITEM(a, i) == PyList_GET_ITEM(b, i);
    return PyBool_FromLong(equal);
}

/* pick(addresses, picks, out): sets out[i] to addresses[index] + offset, where picks[i] is the pair (index, offset).
 * All are 8-byte integers; an address 0 stays 0. IndexError if an index or a size does not fit. */
static PyObject *pick(PyObject *module, PyObject *args) {
    Py_buffer addresses, picks, out;
    PyObject *result = NULL;
    if (!PyArg_ParseTuple(args, "y*y*w*:pick", &addresses, &picks, &out)) return NULL;
    const uint64_t *from = addresses.buf;
    const int64_t *pairs = picks.buf;
    uint64_t *to = out.buf;
    Py_ssize_t count = out.len / 8;
    int inside = picks.len == count * 16;
    for (Py_ssize_t i = 0; inside && i < count; i++) {
        inside = pairs[2 * i] >= 0 && pairs[2 * i] < addresses.len / 8;
        if (inside) to[i] = from[pairs[2 * i]] ? from[pairs[2 * i]] + (uint64_t)pairs[2 * i + 1] : 0;
    }
    if (inside) result = Py_NewRef(Py_None);
    else PyErr_SetString(PyExc_IndexError, "a pair of an index and a start for each address that is wanted");
    PyBuffer_Release(&addresses);
    PyBuffer_Release(&picks);
    PyBuffer_Release(&out);
    return result;
}

static PyMethodDef functions[] = {
    {"describe", describe, METH_VARARGS, NULL}, {"unchanged", unchanged, METH_VARARGS, NULL},
    {"gradients", gradients, METH_VARARGS, NULL}, {"shows", shows, METH_VARARGS, NULL},
    {"same", same, METH_VARARGS, NULL},           {"pick", pick, METH_VARARGS, NULL},
    {"unexpected", unexpected, METH_VARARGS, NULL}, {NULL, NULL, 0, NULL},
};

static int set_up(PyObject *module) { return PyModule_AddIntConstant(module, "VERSION", VERSION); }
static PyModuleDef_Slot slots[] = {{Py_mod_exec, set_up}, {0, NULL}};
static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_snapshots", .m_methods = functions, .m_slots = slots,
};

PyMODINIT_FUNC PyInit__snapshots(void) { return PyModuleDef_Init(&definition); }
