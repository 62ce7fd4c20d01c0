-- Takes the lock KEYS[1], whose queue is KEYS[2], for the token ARGV[1] and ARGV[2] milliseconds, if
-- it is free or has that token already. ARGV[3] fencing tokens come with it, from the counter
-- KEYS[3]; it is raised first if ARGV[4] is not negative, to that at least.
-- Answers {token, 1 if others stand in the queue else 0, the first fencing token} if it was taken,
-- else {milliseconds that the holder has left (-1: it never expires)}. With ARGV[6], the token then
-- stands in the queue, which is kept for that many milliseconds, and the answer goes on with the
-- server's time. With ARGV[7] too, only the token's process stands there, to be told.
-- If ARGV[5] is 1, the token has asked before: one that has neither the lock nor a place in the queue
-- gets nothing, and the answer is {}.
if tonumber(ARGV[4]) >= 0 then raise(tonumber(ARGV[4])) end
local owner, queue = redis.call('GET', KEYS[1]), redis.call('GET', KEYS[2])
if ARGV[5] == '1' and not is_of(owner, ARGV[1]) and not (queue and place_of(queue, ARGV[1])) then
  return {}
end
if queue and not owner then
  -- Whoever waits longest comes before whoever asks.
  pass_on(queue, ARGV[1])
  owner, queue = redis.call('GET', KEYS[1]), redis.call('GET', KEYS[2])
end
if owner and not is_of(owner, ARGV[1]) then
  local left = redis.call('PTTL', KEYS[1])
  local answer = { left }
  if ARGV[6] then
    if ARGV[7] then
      stand(queue, string.sub(ARGV[1], 1, 32), 0, 0, ARGV[6])
    else
      stand(queue, ARGV[1], ARGV[2], ARGV[3], ARGV[6])
    end
    -- Clients of other kinds know no marks: their locks stay as they are.
    if string.find(owner, '^%x+:%d+$') and string.sub(owner, 33, 33) == ':' then
      redis.call('APPEND', KEYS[1], '!')
    end
  end
  if ARGV[6] and not ARGV[7] then
    local time = redis.call('TIME')
    answer = { left, time[1], time[2] }
  end
  redis.pcall('PUBLISH', inbox(owner), 'w ' .. KEYS[1])
  return answer
end
local first = fence(tonumber(ARGV[3]))
if type(first) ~= 'number' then return first end
local others = queue and leave(queue, ARGV[1])
redis.call('SET', KEYS[1], others and ARGV[1] .. '!' or ARGV[1], 'PX', ARGV[2])
return { ARGV[1], others and 1 or 0, first }
