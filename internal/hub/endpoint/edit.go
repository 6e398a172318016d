package endpoint

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// point is one endpoint, whatever object it stands in.
type point struct {
	node                        string
	kind, namespace, name, uid  string // of the object that it is an endpoint of
	addresses                   []string
	ready, serving, terminating bool
}

func (p point) equal(q point) bool {
	return p.ready == q.ready && p.serving == q.serving && slices.Equal(p.addresses, q.addresses)
}

// follow returns the endpoint of a pod as the endpoint controllers of
// Kubernetes would make it from what the kubelet says now. family is the
// address type of the object that it stands in; publish is set for a Service
// that wants its pods' addresses before they are ready.
func (p point) follow(pod Pod, family discoveryv1.AddressType, publish bool) point {
	// An endpoint that was ready though it did not serve, or ended, tells of
	// such a Service too.
	publish = publish || p.ready && (!p.serving || p.terminating)
	var addresses []string
	for _, a := range pod.Addresses {
		if familyOf(a) == family {
			addresses = append(addresses, a)
		}
	}
	there := len(addresses) > 0 && !pod.Ended
	if len(addresses) > 0 {
		p.addresses = addresses
	}
	p.serving = there && pod.Ready
	p.ready = there && (publish || p.serving && !p.terminating)
	return p
}

func familyOf(address string) discoveryv1.AddressType {
	ip, err := netip.ParseAddr(address)
	switch {
	case err != nil:
		return discoveryv1.AddressTypeFQDN
	case ip.Unmap().Is4():
		return discoveryv1.AddressTypeIPv4
	}
	return discoveryv1.AddressTypeIPv6
}

// editor changes the endpoints of an object and nothing else: every field that
// it does not know stays. change returns what stands in an endpoint's place.
type editor struct {
	change  func(p point, family discoveryv1.AddressType) point
	changed bool
}

// edit returns the object with its endpoints changed; changed tells whether
// any was.
func (e *editor) edit(r schema.GroupVersionResource, enc wire.Encoding, object []byte) ([]byte, error) {
	switch {
	case enc == wire.JSON:
		return e.json(r, object)
	case r.Resource == "endpoints":
		return eachField(object, func(num protowire.Number, _, value []byte) ([]byte, error) {
			if num != 2 {
				return nil, errKeep
			}
			return e.subset(value)
		})
	}
	family, err := addressType(object)
	if err != nil {
		return nil, err
	}
	return eachField(object, func(num protowire.Number, _, value []byte) ([]byte, error) {
		if num != 2 {
			return nil, errKeep
		}
		return e.endpoint(value, family)
	})
}

// apply returns what stands in the place of p.
func (e *editor) apply(p point, family discoveryv1.AddressType) (point, bool) {
	to := e.change(p, family)
	if to.equal(p) {
		return p, false
	}
	e.changed = true
	return to, true
}

// errKeep says that a field stays as it is.
var errKeep = errors.New("keep")

// eachField rewrites a message: f returns what stands in place of a field's
// value, or errKeep. Only fields with a length have a value.
func eachField(message []byte, f func(num protowire.Number, whole, value []byte) ([]byte, error)) ([]byte, error) {
	out := make([]byte, 0, len(message)+64)
	err := fields(message, func(num protowire.Number, whole, value []byte, _ uint64) error {
		var to []byte
		err := errKeep
		if value != nil {
			to, err = f(num, whole, value)
		}
		switch {
		case errors.Is(err, errKeep):
			out = append(out, whole...)
			return nil
		case err != nil:
			return err
		}
		out = protowire.AppendTag(out, num, protowire.BytesType)
		out = protowire.AppendBytes(out, to)
		return nil
	})
	return out, err
}

// fields calls f for each field of a message: whole is all of it, value what
// a field with a length holds (never nil then), number what a varint says.
func fields(message []byte, f func(num protowire.Number, whole, value []byte, number uint64) error) error {
	for len(message) > 0 {
		num, typ, n := protowire.ConsumeTag(message)
		if n < 0 {
			return fmt.Errorf("read endpoints: %w", protowire.ParseError(n))
		}
		m := protowire.ConsumeFieldValue(num, typ, message[n:])
		if m < 0 {
			return fmt.Errorf("read endpoints: %w", protowire.ParseError(m))
		}
		var (
			value  []byte
			number uint64
		)
		switch typ { //nolint:exhaustive // the others hold nothing that is read here
		case protowire.BytesType:
			value, _ = protowire.ConsumeBytes(message[n:])
			if value == nil {
				value = []byte{}
			}
		case protowire.VarintType:
			number, _ = protowire.ConsumeVarint(message[n:])
		}
		if err := f(num, message[:n+m], value, number); err != nil {
			return err
		}
		message = message[n+m:]
	}
	return nil
}

// addressType is the field of that name of an EndpointSlice.
func addressType(slice []byte) (family discoveryv1.AddressType, err error) {
	err = fields(slice, func(num protowire.Number, _, value []byte, _ uint64) error {
		if num == 4 {
			family = discoveryv1.AddressType(value)
		}
		return nil
	})
	return family, err
}

// reference reads an ObjectReference into p.
func (p *point) reference(message []byte) error {
	return fields(message, func(num protowire.Number, _, value []byte, _ uint64) error {
		switch num {
		case 1:
			p.kind = string(value)
		case 2:
			p.namespace = string(value)
		case 3:
			p.name = string(value)
		case 4:
			p.uid = string(value)
		}
		return nil
	})
}

// endpoint edits an Endpoint of an EndpointSlice.
func (e *editor) endpoint(message []byte, family discoveryv1.AddressType) ([]byte, error) {
	p := point{ready: true}
	var conditions, unknown, rest []byte // unknown: conditions that are not known here
	serving := -1
	err := fields(message, func(num protowire.Number, whole, value []byte, _ uint64) error {
		switch {
		case value == nil: // none that is known
		case num == 1:
			p.addresses = append(p.addresses, string(value))
			return nil
		case num == 2:
			conditions = append(conditions, value...) // two parts of a message merge so
			return nil
		case num == 4:
			if err := p.reference(value); err != nil {
				return err
			}
		case num == 6:
			p.node = string(value)
		}
		rest = append(rest, whole...)
		return nil
	})
	if err != nil {
		return nil, err
	}
	err = fields(conditions, func(num protowire.Number, whole, _ []byte, number uint64) error {
		switch num {
		case 1:
			p.ready = number != 0
			return nil
		case 2:
			serving = int(number & 1)
			return nil
		case 3:
			p.terminating = number != 0
		}
		unknown = append(unknown, whole...)
		return nil
	})
	if err != nil {
		return nil, err
	}
	if p.serving = serving == 1; serving < 0 {
		p.serving = p.ready // as the API says of one that is not set
	}
	to, changed := e.apply(p, family)
	if !changed {
		return nil, errKeep
	}
	var out []byte
	for _, a := range to.addresses {
		out = protowire.AppendTag(out, 1, protowire.BytesType)
		out = protowire.AppendString(out, a)
	}
	set := protowire.AppendTag(nil, 1, protowire.VarintType)
	set = protowire.AppendVarint(set, protowire.EncodeBool(to.ready))
	set = protowire.AppendTag(set, 2, protowire.VarintType)
	set = protowire.AppendVarint(set, protowire.EncodeBool(to.serving))
	out = protowire.AppendTag(out, 2, protowire.BytesType)
	out = protowire.AppendBytes(out, append(set, unknown...))
	return append(out, rest...), nil
}

// subset edits an EndpointSubset of v1 Endpoints. It lists what is ready and
// what is not apart.
func (e *editor) subset(message []byte) ([]byte, error) {
	var ready, not, rest []byte
	changed := false
	err := fields(message, func(num protowire.Number, whole, value []byte, _ uint64) error {
		if value == nil || num != 1 && num != 2 {
			rest = append(rest, whole...)
			return nil
		}
		address, isReady, moved, err := e.address(value, num == 1)
		if err != nil {
			return err
		}
		changed = changed || moved
		if isReady {
			ready = protowire.AppendTag(ready, 1, protowire.BytesType)
			ready = protowire.AppendBytes(ready, address)
		} else {
			not = protowire.AppendTag(not, 2, protowire.BytesType)
			not = protowire.AppendBytes(not, address)
		}
		return nil
	})
	switch {
	case err != nil:
		return nil, err
	case !changed:
		return nil, errKeep
	}
	return slices.Concat(ready, not, rest), nil
}

// address edits an EndpointAddress of v1 Endpoints.
func (e *editor) address(message []byte, ready bool) (out []byte, isReady, changed bool, err error) {
	p := point{ready: ready, serving: ready, addresses: []string{""}}
	var rest []byte
	err = fields(message, func(num protowire.Number, whole, value []byte, _ uint64) error {
		switch {
		case value == nil: // none that is known
		case num == 1:
			p.addresses[0] = string(value)
			return nil
		case num == 2:
			if err := p.reference(value); err != nil {
				return err
			}
		case num == 4:
			p.node = string(value)
		}
		rest = append(rest, whole...)
		return nil
	})
	if err != nil {
		return nil, false, false, err
	}
	to, changed := e.apply(p, familyOf(p.addresses[0]))
	if !changed {
		return message, ready, false, nil
	}
	out = protowire.AppendTag(nil, 1, protowire.BytesType)
	out = protowire.AppendString(out, to.addresses[0])
	return append(out, rest...), to.ready, true, nil
}

// tree is a JSON object. Numbers keep their text.
type tree = map[string]any

// json is edit for an upstream that does not speak protobuf.
func (e *editor) json(r schema.GroupVersionResource, text []byte) ([]byte, error) {
	var object tree
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	if err := d.Decode(&object); err != nil {
		return nil, fmt.Errorf("read endpoints: %w", err)
	}
	if r.Resource == "endpoints" {
		for subset := range items(object, "subsets") {
			e.jsonSubset(subset)
		}
	} else {
		family, _ := object["addressType"].(string)
		for endpoint := range items(object, "endpoints") {
			e.jsonEndpoint(endpoint, discoveryv1.AddressType(family))
		}
	}
	if !e.changed {
		return text, nil
	}
	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(object); err != nil {
		return nil, fmt.Errorf("write endpoints: %w", err)
	}
	return bytes.TrimSuffix(out.Bytes(), []byte("\n")), nil
}

// items are the objects of a member that is an array.
func items(object tree, name string) func(yield func(tree) bool) {
	return func(yield func(tree) bool) {
		list, _ := object[name].([]any)
		for _, item := range list {
			if t, ok := item.(tree); ok && !yield(t) {
				return
			}
		}
	}
}

func (p *point) jsonReference(object tree) {
	p.node, _ = object["nodeName"].(string)
	ref, _ := object["targetRef"].(tree)
	p.kind, _ = ref["kind"].(string)
	p.namespace, _ = ref["namespace"].(string)
	p.name, _ = ref["name"].(string)
	p.uid, _ = ref["uid"].(string)
}

func (e *editor) jsonEndpoint(endpoint tree, family discoveryv1.AddressType) {
	p := point{ready: true}
	p.jsonReference(endpoint)
	addresses, _ := endpoint["addresses"].([]any)
	for _, a := range addresses {
		text, _ := a.(string)
		p.addresses = append(p.addresses, text)
	}
	conditions, _ := endpoint["conditions"].(tree)
	if b, ok := conditions["ready"].(bool); ok {
		p.ready = b
	}
	p.terminating, _ = conditions["terminating"].(bool)
	var ok bool
	if p.serving, ok = conditions["serving"].(bool); !ok {
		p.serving = p.ready
	}
	to, changed := e.apply(p, family)
	if !changed {
		return
	}
	if conditions == nil {
		conditions = tree{}
		endpoint["conditions"] = conditions
	}
	conditions["ready"], conditions["serving"] = to.ready, to.serving
	endpoint["addresses"] = to.addresses
}

func (e *editor) jsonSubset(subset tree) {
	lists := map[bool][]any{}
	moved := false
	for _, name := range []string{"addresses", "notReadyAddresses"} {
		ready := name == "addresses"
		for address := range items(subset, name) {
			ip, _ := address["ip"].(string)
			p := point{ready: ready, serving: ready, addresses: []string{ip}}
			p.jsonReference(address)
			to, changed := e.apply(p, familyOf(ip))
			if changed {
				moved = true
				address["ip"] = to.addresses[0]
			}
			lists[to.ready] = append(lists[to.ready], address)
		}
	}
	if !moved {
		return
	}
	for _, name := range []string{"addresses", "notReadyAddresses"} {
		ready := name == "addresses"
		if delete(subset, name); len(lists[ready]) > 0 {
			subset[name] = lists[ready]
		}
	}
}
