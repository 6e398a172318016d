package wire

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"sync"

	"google.golang.org/protobuf/encoding/protowire"
	appsv1 "k8s.io/api/apps/v1"
	appsv1beta1 "k8s.io/api/apps/v1beta1"
	appsv1beta2 "k8s.io/api/apps/v1beta2"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// op says how one value is turned from Protobuf to JSON.
type op uint8

const (
	opString op = iota + 1
	opBytes
	opBool
	opInt32
	opInt64
	opFloat64 // the last scalar
	opMessage
	opItems // a named slice, which Protobuf wraps in a message
	opTime
	opMicroTime
	opQuantity
	opIntOrString
	opFieldsV1
	opTyped // by way of the Go type, for rare types with their own JSON
)

// shape says how often a field's value occurs.
type shape uint8

const (
	one shape = iota
	pointer
	list
	mapping
	inline // a nested message whose JSON members belong to its parent
)

// message is the plan for one Go struct: its fields in the order of the
// struct, which is the order of its JSON.
type message struct {
	fields []member
	silent []bool  // whether a field that is absent writes nothing
	byNum  []int16 // index into fields by Protobuf number, -1 if unknown

	once   sync.Once
	routes map[string]route // made by byName
}

type member struct {
	name      []byte // with quotes and colon
	shape     shape
	omitEmpty bool
	omitZero  bool
	value     value
}

// nilable says whether the field's Go zero is nil.
func (f *member) nilable() bool {
	return f.shape != one && f.shape != inline || f.value.op == opBytes || f.value.op == opItems
}

type value struct {
	op     op
	wire   protowire.Type
	msg    *message
	typ    reflect.Type // of opTyped
	prefix []byte       // members to start an opMessage with
}

func (o op) wire() protowire.Type {
	switch o {
	case opBool, opInt32, opInt64:
		return protowire.VarintType
	case opFloat64:
		return protowire.Fixed64Type
	default:
		return protowire.BytesType
	}
}

// plans makes and keeps the plans of the kinds that were asked for.
type plans struct {
	byKind sync.Map // schema.GroupVersionKind to *message, nil if unplannable

	mu     sync.Mutex
	byType map[reflect.Type]*message // guarded by mu; plans recur
}

// of returns a kind's plan, nil if its type needs the typed path.
func (p *plans) of(gvk schema.GroupVersionKind) (*message, error) {
	if m, ok := p.byKind.Load(gvk); ok {
		return m.(*message), nil //nolint:errcheck // only messages go in
	}
	typ, ok := kinds().AllKnownTypes()[gvk]
	if !ok {
		return nil, ErrUnknownKind
	}
	if !isObject(typ) {
		return nil, fmt.Errorf("%w in protobuf", ErrUnknownKind)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	m, err := p.message(typ)
	if err != nil {
		m = nil
		clear(p.byType) // may hold plans that point to unfinished ones
	}
	p.byKind.Store(gvk, m)
	return m, nil
}

// message plans a struct. p.mu is held.
func (p *plans) message(typ reflect.Type) (*message, error) {
	if m, ok := p.byType[typ]; ok {
		return m, nil
	}
	m := &message{}
	p.byType[typ] = m
	for sf := range typ.Fields() {
		if sf.Type == reflect.TypeFor[metav1.TypeMeta]() {
			continue // not on the wire
		}
		num, f, err := p.field(typ, sf)
		if err != nil {
			return nil, fmt.Errorf("%s.%s: %w", typ, sf.Name, err)
		}
		for len(m.byNum) <= num {
			m.byNum = append(m.byNum, -1)
		}
		m.byNum[num] = int16(len(m.fields))
		m.fields = append(m.fields, f)
		m.silent = append(m.silent, f.omitZero || f.omitEmpty && (f.nilable() || f.value.op <= opFloat64))
	}
	return m, nil
}

func (p *plans) field(parent reflect.Type, sf reflect.StructField) (num int, f member, err error) {
	parts := strings.Split(sf.Tag.Get("protobuf"), ",")
	if len(parts) < 2 {
		return 0, member{}, errors.New("no protobuf tag")
	}
	num, err = strconv.Atoi(parts[1])
	if err != nil || num < 1 || num > 1000 {
		return 0, member{}, fmt.Errorf("protobuf number %q", parts[1])
	}
	name, options, _ := strings.Cut(sf.Tag.Get("json"), ",")
	if err := f.set(options); err != nil {
		return 0, member{}, err
	}
	typ := sf.Type
	if f.shape == inline {
		if typ.Kind() != reflect.Struct || !sf.Anonymous || name != "" {
			return 0, member{}, errors.New("unusual inline field")
		}
	} else if name == "" || name == "-" {
		return 0, member{}, fmt.Errorf("json name %q", name)
	}
	f.name = append(appendJSONString(nil, name), ':')

	switch {
	case f.shape == inline, isMessage(typ):
	case typ.Kind() == reflect.Pointer:
		f.shape, typ = pointer, typ.Elem()
	case typ.Kind() == reflect.Map && typ.Key().Kind() == reflect.String:
		f.shape, typ = mapping, typ.Elem()
	case typ.Kind() == reflect.Slice && typ.Elem().Kind() != reflect.Uint8:
		f.shape, typ = list, typ.Elem()
	}
	f.value, err = p.value(typ)
	if err != nil {
		return 0, member{}, err
	}
	f.value.wire = f.value.op.wire()
	if err := f.check(typ); err != nil {
		return 0, member{}, err
	}
	f.value.prefix = prefixOf(parent, sf.Name)
	return num, f, nil
}

// prefixOf returns the type of claim templates: the API server sets it, alone
// of all nested objects, on their way out of its internal version.
func prefixOf(parent reflect.Type, field string) []byte {
	if field != "VolumeClaimTemplates" {
		return nil
	}
	switch parent {
	case reflect.TypeFor[appsv1.StatefulSetSpec](), reflect.TypeFor[appsv1beta1.StatefulSetSpec](),
		reflect.TypeFor[appsv1beta2.StatefulSetSpec]():
		return appendJSONType(nil, "v1", "PersistentVolumeClaim")
	}
	return nil
}

// set takes the options of a json tag.
func (f *member) set(options string) error {
	for option := range strings.SplitSeq(options, ",") {
		switch option {
		case "":
		case "omitempty":
			f.omitEmpty = true
		case "omitzero":
			f.omitZero = true
		case "inline":
			f.shape = inline
		default:
			return fmt.Errorf("json option %q", option)
		}
	}
	return nil
}

// check refuses what the transcoder cannot write.
func (f *member) check(typ reflect.Type) error {
	switch {
	case f.shape == mapping && f.value.wire != protowire.BytesType:
		return fmt.Errorf("map of %s", typ)
	case f.shape == list && (f.value.op == opBytes || f.value.op == opItems || f.value.op == opFloat64):
		return fmt.Errorf("list of %s", typ)
	case f.omitZero && f.value.op != opTime:
		return fmt.Errorf("omitzero of %s", typ)
	}
	return nil
}

// isObject says whether a registered type is an object with a Protobuf form;
// WatchEvent, for one, is none.
func isObject(typ reflect.Type) bool {
	sf, ok := typ.FieldByName("TypeMeta")
	return ok && sf.Type == reflect.TypeFor[metav1.TypeMeta]() && isMessage(typ)
}

func isMessage(typ reflect.Type) bool {
	return reflect.PointerTo(typ).Implements(reflect.TypeFor[protoMessage]())
}

func (p *plans) value(typ reflect.Type) (v value, err error) {
	switch typ {
	case reflect.TypeFor[metav1.Time]():
		return value{op: opTime}, nil
	case reflect.TypeFor[metav1.MicroTime]():
		return value{op: opMicroTime}, nil
	case reflect.TypeFor[resource.Quantity]():
		return value{op: opQuantity}, nil
	case reflect.TypeFor[intstr.IntOrString]():
		return value{op: opIntOrString}, nil
	case reflect.TypeFor[metav1.FieldsV1]():
		return value{op: opFieldsV1}, nil
	}
	if reflect.PointerTo(typ).Implements(reflect.TypeFor[json.Marshaler]()) {
		if !isMessage(typ) {
			return value{}, fmt.Errorf("%s has its own JSON", typ)
		}
		return value{op: opTyped, typ: typ}, nil
	}
	switch typ.Kind() {
	case reflect.String:
		v.op = opString
	case reflect.Bool:
		v.op = opBool
	case reflect.Int32:
		v.op = opInt32
	case reflect.Int64:
		v.op = opInt64
	case reflect.Float64:
		v.op = opFloat64
	case reflect.Slice:
		switch {
		case typ.Elem().Kind() == reflect.Uint8:
			v.op = opBytes
		case isMessage(typ) && typ.Elem().Kind() == reflect.String:
			v.op = opItems
		}
	case reflect.Struct:
		if isMessage(typ) {
			v.op = opMessage
			v.msg, err = p.message(typ)
		}
	}
	if v.op == 0 {
		err = fmt.Errorf("unplannable type %s", typ)
	}
	return v, err
}
